"""Generates with transformers."""

import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams

sys.path.append(os.environ["VLLM_SUITE_FILES"])
from reference import Reference


@dataclass(frozen=True)
class CompletionOutput:
    text: str


@dataclass(frozen=True)
class RequestOutput:
    outputs: list[CompletionOutput]


class AsyncLLMEngine:
    """One answer per request, and that whole."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs) -> "AsyncLLMEngine":
        return cls(Reference(Path(os.environ["VLLM_SUITE_REPOSITORY"], "vllm_model", "1", args.model)))

    async def generate(self, prompt: str, params: SamplingParams, request_id: str) -> AsyncIterator[RequestOutput]:
        if params.structured_outputs is not None:
            text = self._reference.choose(prompt, params.structured_outputs.choice)
        else:
            text = self._reference.continuation(prompt, params.max_tokens).text
        yield RequestOutput([CompletionOutput(text)])
