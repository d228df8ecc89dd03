"""From a model's files to a runner that is ready for its first step."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from flashserve.config import DeviceFacts, EngineConfig, ResolvedConfig, resolve
from flashserve.models.dtypes import WEIGHT_DTYPES
from flashserve.models.files import ModelFiles
from flashserve.models.model_input import CausalLM
from flashserve.models.registry import load_model, read_model_facts
from flashserve.runner.device import Device
from flashserve.runner.device_queue import CpuQueue
from flashserve.runner.input_builder import InputBuilder
from flashserve.runner.kv_cache import kv_block_bytes, kv_cache_spec
from flashserve.runner.model_runner import ModelRunner, decode_batch_sizes
from flashserve.runner.slots import SlotTable
from flashserve.runner.staging import StepSizes
from flashserve.runner.step_model import StepModel
from flashserve.runner.steps import EagerSteps
from flashserve.scheduling.output import ScheduledRow, SchedulerOutput
from flashserve_kernels import Ops

log = logging.getLogger(__name__)


def load_runner(files: ModelFiles, config: EngineConfig, device: Device) -> ModelRunner:
    """Choose the ops, load the weights, give the KV cache what memory is left, and warm up.

    To be called inside ``device.loading()``. Raises ConfigError when the model or the settings cannot be served.
    """
    before = device.read_facts()
    facts = read_model_facts(files, config, before)
    ops = device.select_ops(config, facts.head_dim)
    block_bytes = kv_block_bytes(ops, config, facts)
    resolved = resolve(config, facts, before, block_bytes)
    started = time.perf_counter()
    model = load_model(files, resolved, device.torch_device, ops)
    log.info("loaded %s in %.1f s; ops: %s", facts.architecture, time.perf_counter() - started, ops.name)
    left = measure_memory(model, resolved, device, ops)
    runner = ModelRunner(model, resolve(config, facts, left, block_bytes), device, ops)
    runner.warm_up()
    return runner


def measure_memory(model: CausalLM, resolved: ResolvedConfig, device: Device, ops: Ops) -> DeviceFacts:
    """What the device has left for the KV cache beside the weights, the largest step and the captured ones."""
    facts = device.measure(resolved.device, lambda: _run_largest_step(model, resolved, device, ops))
    if resolved.config.enforce_eager or not ops.captures:
        return facts
    # Each captured batch size keeps its logits: 0.7 GB for 256 requests and a vocabulary of 152k.
    rows = sum(decode_batch_sizes(resolved.max_num_seqs))
    kept = rows * resolved.model.vocab_size * WEIGHT_DTYPES[resolved.dtype].itemsize
    return replace(facts, free_bytes=facts.free_bytes - kept, used_bytes=facts.used_bytes + kept)


@torch.inference_mode()
def _run_largest_step(model: CausalLM, resolved: ResolvedConfig, device: Device, ops: Ops) -> None:
    """A step of the whole token budget over a cache of one block, for its activations' size alone."""
    slots = SlotTable.for_engine(resolved, device.torch_device)
    builder = InputBuilder(slots, resolved.block_size)
    step_model = StepModel.build(model, ops, kv_cache_spec(resolved.config, resolved.model), 1, slots)
    longest, budget = resolved.max_model_len, resolved.max_num_batched_tokens
    lens = [min(longest, budget - first) for first in range(0, budget, longest)][: resolved.max_num_seqs]
    sizes = StepSizes(sum(lens), len(lens), len(lens))
    steps = EagerSteps(step_model, builder, CpuQueue(), sizes, device.torch_device)
    # Their keys and values all go to block 0, over each other.
    rows = [ScheduledRow(slot, slot, 0, length, [0] * length, [], 1) for slot, length in enumerate(lens)]
    steps.logits(builder.arrange(SchedulerOutput(0, [], rows, sizes.tokens, [])))
    steps.sample(step_model.every_stage)
