"""From a model's files to a runner that is ready for its first step."""

from __future__ import annotations

import logging
import time

from flashserve.config import EngineConfig, resolve
from flashserve.errors import ConfigError
from flashserve.models.files import ModelFiles
from flashserve.models.registry import load_model, read_model_facts
from flashserve.runner.device import Device
from flashserve.runner.kv_cache import kv_block_bytes
from flashserve.runner.kv_scales import find_kv_scales
from flashserve.runner.memory_profile import measure_memory
from flashserve.runner.model_runner import ModelRunner

log = logging.getLogger(__name__)


def load_runner(files: ModelFiles, config: EngineConfig, device: Device) -> ModelRunner:
    """Choose the ops, load the weights, give the KV cache what memory is left, and warm up.

    To be called inside ``device.loading()``. Raises ConfigError when the model or the settings cannot be served.
    """
    before = device.read_facts()
    facts = read_model_facts(files, config, before)
    ops = device.select_ops(config, facts.head_dim)
    if config.batch_invariant and not ops.is_batch_invariant:
        raise ConfigError(f"batch_invariant is not to be had with {ops.name} ops: it needs a GPU")
    block_bytes = kv_block_bytes(ops, config, facts)
    resolved = resolve(config, facts, before, block_bytes)
    started = time.perf_counter()
    model = load_model(files, resolved, device.torch_device, ops)
    log.info("loaded %s in %.1f s; ops: %s", facts.architecture, time.perf_counter() - started, ops.name)
    scaling = find_kv_scales(files, model, resolved, device, ops)
    left = measure_memory(model, resolved, device, ops)
    runner = ModelRunner(model, scaling.apply(resolve(config, facts, left, block_bytes)), device, ops)
    runner.warm_up()
    return runner
