"""The tensor contract: every input and output, written once.

It is a superset of the Triton vLLM backend's contract. ``auto_complete_config`` declares it to Triton from here,
the request parser checks tensors against it, the responder builds its answers from it. This module imports
nothing heavy: ``auto_complete_config`` runs in an interpreter of its own, before every load of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flashserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name, Triton's name of its element type (STRING, BOOL, INT32, ...), and its shape."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    """-1 is any length."""
    optional: bool = True

    def as_config(self) -> dict[str, Any]:
        """The entry of an input in a model's configuration."""
        return {
            "name": self.name,
            "data_type": f"TYPE_{self.dtype}",
            "dims": list(self.dims),
            "optional": self.optional,
        }


INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_input", "STRING"),
    TensorSpec("chat_request", "STRING"),
    TensorSpec("tokenize_request", "STRING"),
    TensorSpec("embedding_request", "STRING"),
    TensorSpec("image", "STRING", (-1,)),
    TensorSpec("sampling_parameters", "STRING"),
    TensorSpec("max_tokens", "INT32"),
    TensorSpec("stream", "BOOL"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("return_finish_reason", "BOOL"),
    TensorSpec("return_cumulative_logprob", "BOOL"),
    TensorSpec("return_logprobs", "BOOL"),
    TensorSpec("return_num_input_tokens", "BOOL"),
    TensorSpec("return_num_output_tokens", "BOOL"),
    TensorSpec("return_request_metrics", "BOOL"),
    TensorSpec("return_progress", "BOOL"),
)

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", "STRING", (-1,), optional=False),
    TensorSpec("finish_reason", "STRING", (-1,), optional=False),
    TensorSpec("cumulative_logprob", "FP32", (-1,), optional=False),
    TensorSpec("logprobs", "STRING", (-1,), optional=False),
    TensorSpec("num_input_tokens", "UINT32", (1,), optional=False),
    TensorSpec("num_output_tokens", "UINT32", (-1,), optional=False),
    TensorSpec("request_metrics", "STRING", (1,), optional=False),
    TensorSpec("prompt_progress", "STRING", (1,), optional=False),
    TensorSpec("prompt_logprobs", "STRING", (1,), optional=False),
)

INPUT_BY_NAME: dict[str, TensorSpec] = {spec.name: spec for spec in INPUTS}
OUTPUT_BY_NAME: dict[str, TensorSpec] = {spec.name: spec for spec in OUTPUTS}

REMEDY = "remove the entry from config.pbtxt: the backend declares its tensors itself"


def declare(config: Any) -> Any:
    """Fill in Triton's model configuration: the tensors, no batching by Triton, decoupled responses.

    ``config`` is the ``ModelConfig`` that Triton hands to ``auto_complete_config``; it is returned. What
    ``config.pbtxt`` already holds may repeat the contract. Raises ConfigError where it contradicts it.
    """
    given = config.as_dict()
    if given.get("max_batch_size", 0) != 0:
        raise ConfigError(
            f"config.pbtxt sets max_batch_size: {given['max_batch_size']}, it must be 0: the engine does the batching "
            "(max_num_seqs in model.json bounds it)"
        )
    if given.get("model_transaction_policy", {}).get("decoupled", True) is not True:
        raise ConfigError("config.pbtxt sets decoupled: false, it must be true: one request has many responses")
    _check_entries("input", given.get("input", ()), INPUT_BY_NAME)
    _check_entries("output", given.get("output", ()), OUTPUT_BY_NAME)

    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": True})
    for spec in INPUTS:
        config.add_input(spec.as_config())
    for spec in OUTPUTS:
        config.add_output({key: value for key, value in spec.as_config().items() if key != "optional"})
    return config


def _check_entries(kind: str, entries: Iterable[Mapping[str, Any]], known: Mapping[str, TensorSpec]) -> None:
    """Compare what config.pbtxt declares with the contract; what it leaves open, Triton lets us fill in."""
    for entry in entries:
        name = entry.get("name", "")
        if name not in known:
            raise ConfigError(f"config.pbtxt declares the {kind} {name!r}, which flashserve does not have; {REMEDY}")
        wanted = known[name].as_config()
        if kind == "output":
            del wanted["optional"]
        for key, value in wanted.items():
            # Triton prints unset fields with their defaults: `optional` is False there if it was not written.
            given = entry.get(key, value)
            if given not in (value, "TYPE_INVALID", []):
                raise ConfigError(
                    f"config.pbtxt declares the {kind} {name!r} with {key}: {given}, not {value}; {REMEDY}"
                )
