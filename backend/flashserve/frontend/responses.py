"""Builds Triton responses. The tensors' names and types are those of ``tensor_spec``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from flashserve.errors import FlashserveError, InternalError, InvalidArgument
from flashserve.frontend.generation import Generation
from flashserve.protocol import FinishReason, RequestTimings
from flashserve.text.completion import Delta
from flashserve.text.logprobs import to_json


class ResponseBuilder:
    """Made once per model with the ``triton_python_backend_utils`` module, which exists only inside a stub.

    Any thread may use it. No tensor is in two responses: ``send`` writes to a response's tensors, without the GIL.
    """

    def __init__(self, pb_utils: Any, plain_errors: bool = False) -> None:
        """``plain_errors``: messages as Triton's vLLM backend words them, without our suffix."""
        self._pb = pb_utils
        self._plain_errors = plain_errors

    def generation(
        self, generation: Generation, deltas: Sequence[Delta], finish_reasons: Sequence[FinishReason | None]
    ) -> Any:
        """A data response, an entry for each sample: deltas while streaming, else everything. ``finish_reasons``: None
        for samples that go on; it is the last response if there is none."""
        wanted = generation.parsed.outputs
        tensors = [self._strings("text_output", [delta.text for delta in deltas])]
        if wanted.finish_reason:
            tensors.append(self._strings("finish_reason", [reason or "None" for reason in finish_reasons]))
        if wanted.cumulative_logprob:
            sums = np.array([delta.cumulative_logprob for delta in deltas], dtype=np.float32)
            tensors.append(self._pb.Tensor("cumulative_logprob", sums))
        if wanted.logprobs:
            shown = generation.parsed.shows_logprobs
            tensors.append(self._strings("logprobs", [to_json(d.scores) if shown else "null" for d in deltas]))
        if (prompt := generation.completions[0].take_prompt_scores()) is not None:
            tensors.append(self._strings("prompt_logprobs", [to_json(prompt)]))
        if wanted.num_input_tokens:
            tensors.append(self._counts("num_input_tokens", [len(generation.message.prompt_token_ids)]))
        if wanted.num_output_tokens:
            tensors.append(self._counts("num_output_tokens", [delta.num_tokens for delta in deltas]))
        if wanted.request_metrics and None not in finish_reasons and generation.timings is not None:
            tensors.append(self._strings("request_metrics", [json.dumps(request_metrics(generation))]))
        if (progress := generation.take_progress()) is not None:
            tensors.append(self._strings("prompt_progress", [json.dumps(msgspec.structs.asdict(progress))]))
        return self._pb.InferenceResponse(tensors)

    def text(self, text: str) -> Any:
        """A response that is only text, such as the answer to a tokenize_request."""
        return self._pb.InferenceResponse([self._strings("text_output", [text])])

    def error(self, error: FlashserveError) -> Any:
        """The code goes twice: as Triton's own, for servers that keep it, and in the message's suffix."""
        code = getattr(self._pb.TritonError, error.code)
        message = _vllm_message(error) if self._plain_errors else error.wire_message()
        return self._pb.InferenceResponse(error=self._pb.TritonError(message, code))

    def _strings(self, name: str, values: Sequence[str]) -> Any:
        # An object array of bytes: numpy's own bytes type would drop trailing zero bytes.
        return self._pb.Tensor(name, np.array([value.encode() for value in values], dtype=object))

    def _counts(self, name: str, values: Sequence[int]) -> Any:
        return self._pb.Tensor(name, np.array(values, dtype=np.uint32))


def _vllm_message(error: FlashserveError) -> str:
    """Triton's vLLM backend puts this before what its engine raises, and nothing before what it says itself."""
    by_the_engine = isinstance(error, (InvalidArgument, InternalError))
    return f"Error generating stream: {error.message}" if by_the_engine else error.message


def request_metrics(generation: Generation) -> dict[str, float | int | None]:
    """The contract's ``request_metrics``: milliseconds, and what the cache and preemption did."""
    timings = generation.timings
    assert timings is not None
    spans = time_spans(timings, generation.last_token_time)
    milliseconds = {f"{name}_ms": None if span is None else round(span * 1000, 3) for name, span in spans.items()}
    return {**milliseconds, "cached_tokens": timings.cached_tokens, "preemptions": timings.preemptions}


def time_spans(timings: RequestTimings, last_token: float | None) -> dict[str, float | None]:
    """Seconds of each part of a request's life; None for parts it did not reach.

    ``last_token`` is the moment of the last token that counts, which a stop string puts before the engine's last.
    """
    scheduled, first = timings.first_scheduled, timings.first_token
    return {
        "queue": None if scheduled is None else scheduled - timings.arrival,
        "prefill": None if scheduled is None or first is None else first - scheduled,
        "ttft": None if first is None else first - timings.arrival,
        "decode": None if first is None or last_token is None else max(0.0, last_token - first),
    }
