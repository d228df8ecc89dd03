"""From a configuration to an engine that is ready to step."""

from __future__ import annotations

from flashserve.config import EngineConfig, ResolvedConfig, kv_dtype, resolve
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

    from flashserve.runner.device import loading_lock, read_device_facts, torch_device
    from flashserve.runner.model_runner import ModelRunner

    with loading_lock(torch_device(config.device, read_device_facts(config.device))):
        device = read_device_facts(config.device)
        facts = read_model_facts(config, device.kind)
        runner = ModelRunner(resolve(config, facts, device))
        runner.load_weights()
        resolved = resolve(config, facts, runner.measure_memory())
        runner.prepare(resolved)
        runner.warm_up()
    layout = f"block{config.block_size}-{kv_dtype(config, resolved.dtype)}"
    return resolved, build_core(resolved, runner, fingerprint(facts.path, resolved.dtype, layout))
