"""``parameters`` of ``config.pbtxt``: those of Triton's vLLM backend, with the meaning that they have there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flashserve.errors import ConfigError

VLLM_BACKEND = "vllm"


@dataclass(frozen=True)
class ModelParameters:
    """What a model's configuration says about its frontend."""

    report_metrics: bool
    """REPORT_CUSTOM_METRICS: the model's metrics are in Triton's /metrics. Default: true; for a configuration of the
    vLLM backend false, as there."""
    plain_errors: bool
    """The configuration is one of the vLLM backend, whose clients know its words and no suffix."""
    health_check: bool
    """ENABLE_VLLM_HEALTH_CHECK: a request that finds the engine dead unloads the model, so that Triton's readiness says
    so. Default false: the engine is started anew and the model stays."""


def read(model_config: str, disable_log_stats: bool = False) -> ModelParameters:
    """From the JSON that Triton hands to ``initialize``; ``disable_log_stats`` is model.json's. Raises ConfigError."""
    config: dict[str, Any] = json.loads(model_config)
    parameters = {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}
    of_vllm = config.get("backend") == VLLM_BACKEND
    report = _bool(parameters, "REPORT_CUSTOM_METRICS", default=not of_vllm)
    return ModelParameters(
        report_metrics=report and not disable_log_stats,
        plain_errors=of_vllm,
        health_check=_bool(parameters, "ENABLE_VLLM_HEALTH_CHECK", default=False),
    )


def _bool(parameters: dict[str, str], name: str, default: bool) -> bool:
    if name not in parameters:
        return default
    value = parameters[name].strip().lower()
    if value not in ("true", "false"):
        raise ConfigError(f'config.pbtxt: the parameter {name} must be "true" or "false", not {parameters[name]!r}')
    return value == "true"
