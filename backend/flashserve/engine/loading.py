"""From a configuration to an engine that is ready to step."""

from __future__ import annotations

from flashserve.config import EngineConfig, ResolvedConfig, resolve, resolve_dtype
from flashserve.engine.core import EngineCore, build_core
from flashserve.runner.threads import limit_spinning


def load_engine(config: EngineConfig) -> tuple[ResolvedConfig, EngineCore]:
    """Read the model's facts, resolve the configuration, load the weights, warm up.

    Raises ConfigError when the model or the settings cannot be served.
    """
    limit_spinning()  # before anything imports torch
    from flashserve.models.registry import fingerprint, read_model_facts

    if config.device.split(":")[0] == "null":
        from flashserve.runner.null_runner import NULL_DEVICE, NullRunner, step_seconds

        resolved = resolve(config, read_model_facts(config, NULL_DEVICE.kind), NULL_DEVICE)
        null_runner = NullRunner(resolved.model.vocab_size, step_seconds(config.device))
        return resolved, build_core(resolved, null_runner, cache_root="null")

    from flashserve.runner.device import read_device_facts
    from flashserve.runner.model_runner import ModelRunner

    device = read_device_facts(config.device)
    facts = read_model_facts(config, device.kind)
    resolved = resolve(config, facts, device)
    runner = ModelRunner(resolved)
    runner.load()
    runner.warm_up()
    dtype = resolve_dtype(config.dtype, facts.checkpoint_dtype, device.kind)
    return resolved, build_core(resolved, runner, fingerprint(facts.path, dtype, f"block{config.block_size}"))
