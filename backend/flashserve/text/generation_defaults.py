"""Sampling defaults that a model brings along in ``generation_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashserve.errors import ConfigError

# Name in the file -> name of the parameter.
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's requests take where they say nothing."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters by name."""
    max_length: int | None = None
    """Most tokens of prompt and output together, of a text without max_tokens."""


def read_generation_defaults(
    generation_config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> GenerationDefaults:
    """A model's values, and over them ``overrides`` under the file's names.

    As in vLLM, ``do_sample`` has no say: a model whose file names no temperature samples with temperature 1, also
    if it says ``do_sample: false``. The caller checks the values together with everything else. Raises ConfigError for
    overrides that have no effect here.
    """
    _check_overrides(overrides or {})
    values = {**generation_config, **(overrides or {})}
    parameters = {ours: values[theirs] for theirs, ours in NAMES.items() if values.get(theirs) is not None}
    max_length = values.get("max_length")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ConfigError(f"generation_config: max_length must be a positive integer, not {max_length!r}")
    return GenerationDefaults(parameters, max_length)


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    """What a user writes into model.json is honoured or refused; a file that came with the model is taken as it is."""
    for name, value in overrides.items():
        if value is None or name in NAMES or name == "max_length":
            continue
        known = ", ".join((*NAMES, "max_length"))
        raise ConfigError(f"override_generation_config: {name}={value!r} is not supported; it takes {known}")
