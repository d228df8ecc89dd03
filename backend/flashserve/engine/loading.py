"""From a configuration to an engine that is ready to step."""

from __future__ import annotations

from flashserve.config import EngineConfig, ResolvedConfig, resolve
from flashserve.engine.core import EngineCore, build_core
from flashserve.runner.threads import limit_spinning


def load_engine(config: EngineConfig) -> tuple[ResolvedConfig, EngineCore]:
    """Open the model's files, load the weights, warm up.

    Raises ConfigError when the model or the settings cannot be served.
    """
    limit_spinning()  # before anything imports torch
    if config.device.split(":")[0] == "null":
        return _load_null_engine(config)
    from flashserve.models.registry import open_model
    from flashserve.runner.device import open_device
    from flashserve.runner.kv_cache import kv_cache_spec
    from flashserve.runner.loading import load_runner

    device = open_device(config.device)
    with device.loading():
        files = open_model(config)
        runner = load_runner(files, config, device)
    resolved = runner.resolved
    spec = kv_cache_spec(config, resolved.model, resolved.kv_scales)
    layout = f"block{config.block_size}-{spec.cache_dtype}{spec.scales}-{config.quantization}"
    return resolved, build_core(resolved, runner, files.fingerprint(resolved.dtype, layout))


def _load_null_engine(config: EngineConfig) -> tuple[ResolvedConfig, EngineCore]:
    from flashserve.models.registry import open_model, read_model_facts
    from flashserve.runner.null_runner import NULL_DEVICE, NullRunner, null_block_bytes, step_seconds

    facts = read_model_facts(open_model(config), config, NULL_DEVICE)
    resolved = resolve(config, facts, NULL_DEVICE, null_block_bytes(config, facts))
    runner = NullRunner(facts.vocab_size, step_seconds(config.device), facts.hidden_size)
    return resolved, build_core(resolved, runner, cache_root="null")
