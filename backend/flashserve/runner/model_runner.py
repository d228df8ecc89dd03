"""Runs a model's steps on a device. Implements Runner."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flashserve.config import DeviceFacts, ResolvedConfig
from flashserve.errors import ConfigError
from flashserve.models.checkpoint import CheckpointWeights
from flashserve.models.model_input import CausalLM
from flashserve.models.registry import find_architecture, open_model
from flashserve.protocol import SamplingParams
from flashserve.runner.device import measure_gpu_memory, torch_device
from flashserve.runner.device_queue import CpuQueue, CudaQueue, DeviceQueue, Download
from flashserve.runner.input_builder import InputBuilder
from flashserve.runner.slots import SlotTable
from flashserve.runner.staging import StepSizes
from flashserve.runner.step_model import StepModel
from flashserve.runner.steps import EagerSteps, RecordedSteps, Steps
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput, StepOutput
from flashserve_kernels import Ops, RecordingOps, select_ops

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class StepHandle:
    """A step on its way."""

    num_rows: int
    sample_rows: np.ndarray
    """[N]: the plan's rows that sample."""
    tokens: Download
    """[N or more] int64."""


class ModelRunner:
    """The model, its KV cache and the state of its slots. Use from one thread."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        """resolved: all but its number of blocks is final."""
        self._resolved = resolved
        self._device = torch_device(resolved.config.device, resolved.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # on which Triton starts kernels, wherever their tensors are
        self._dtype = DTYPES[resolved.dtype]
        self._ops = self._select_ops()
        self._model: CausalLM | None = None
        self._steps: Steps | None = None
        self._step_model: StepModel | None = None
        self.run_ahead = False

    def load_weights(self) -> None:
        """Build the model. Raises ConfigError where weights and config.json do not fit."""
        if self._device.type == "cuda":
            from flashserve_kernels.gpu.launch import unmark_warm

            unmark_warm()
        started = time.perf_counter()
        self._model = load_model(self._resolved, self._dtype, self._device, self._ops)
        seconds = time.perf_counter() - started
        log.info("loaded %s in %.1f s; ops: %s", self._resolved.model.architecture, seconds, self._ops.name)

    @torch.inference_mode()
    def measure_memory(self) -> DeviceFacts:
        """What the device has left for the KV cache: on a GPU after the largest step has run once."""
        facts = self._resolved.device
        if self._device.type == "cpu":
            return facts
        facts = measure_gpu_memory(facts, self._device, lambda: self._run_largest_step())
        if self._resolved.config.enforce_eager or not self._ops.captures:
            return facts
        # Each captured batch size keeps its logits: 0.7 GB for 256 requests and a vocabulary of 152k.
        rows = sum(decode_batch_sizes(self._resolved.max_num_seqs))
        kept = rows * self._resolved.model.vocab_size * self._dtype.itemsize
        return replace(facts, free_bytes=facts.free_bytes - kept, used_bytes=facts.used_bytes + kept)

    @torch.inference_mode()
    def prepare(self, resolved: ResolvedConfig) -> None:
        """Allocate the KV cache and what lives between steps; capture or record steps."""
        self._resolved = resolved
        self._step_model = self._make_step_model(resolved, resolved.num_blocks)
        self._steps = self._make_steps(self._step_model)
        self.run_ahead = self._steps.queue.run_ahead

    @torch.inference_mode()
    def submit(self, plan: SchedulerOutput) -> StepHandle:
        """Start the step; on a CPU it is done on return."""
        if self._steps is None or self._step_model is None:
            raise RuntimeError("the runner is not loaded, or closed")
        step = self._builder.arrange(plan)
        logits = self._steps.logits(step)
        queue = self._steps.queue
        if not step.sampling.size:
            # Waited for all the same: steps of a long prompt would else pile up on a GPU and reuse buffers too early.
            return StepHandle(len(plan.rows), step.plan_rows, queue.download(self._slots.last_tokens[:1]))
        ruled_out = self._slots.early_ends(step.sample_slots, step.sample_positions)
        if ruled_out is not None:
            self._rule_out(logits, *ruled_out)
        return StepHandle(len(plan.rows), step.plan_rows, queue.download(self._steps.sample()))

    def wait(self, handle: StepHandle) -> StepOutput:
        """The samples, on the host."""
        token_ids: list[list[int]] = [[] for _ in range(handle.num_rows)]
        tokens = handle.tokens.result()[: len(handle.sample_rows)].tolist()
        for row, token in zip(handle.sample_rows.tolist(), tokens, strict=True):
            token_ids[row] = [token]
        return StepOutput(token_ids)

    def warm_up(self) -> None:
        """Run a prefill and some decode steps, so that the first request pays for no lazy initialisation."""
        vocab, block_size = self._resolved.model.vocab_size, self._resolved.block_size
        num_tokens = min(self._resolved.max_num_batched_tokens, block_size, self._resolved.max_model_len)
        for temperature in (0.0, 1.0):
            params = SamplingParams(temperature=temperature, top_p=0.9)
            admission = Admission(0, 0, params, 0, num_tokens, ())
            row = ScheduledRow(0, 0, 0, num_tokens, [i % vocab for i in range(num_tokens)], [0], True)
            self.wait(self.submit(SchedulerOutput(0, [admission], [row], num_tokens, [])))
            # The same token again: its key and value are written once more to the same place.
            decode = ScheduledRow(0, 0, num_tokens - 1, 1, [], [], True)
            self.wait(self.submit(SchedulerOutput(1, [], [decode], 1, [])))
        if self._device.type == "cuda":
            self._compile_all_lengths()
            from flashserve_kernels.gpu.launch import mark_warm

            mark_warm()

    def close(self) -> None:
        """Free the model and the cache. Idempotent."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a step may be under way in the memory that is freed here
        self._steps = self._step_model = self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _rule_out(self, logits: torch.Tensor, rows: np.ndarray, tokens: np.ndarray) -> None:
        model, steps = self._step_model, self._steps
        assert model is not None and steps is not None

        def rule_out() -> None:
            ids = [torch.from_numpy(array) for array in (rows, tokens)]
            if self._device.type == "cuda":  # from pinned memory, or the copies would wait for the steps under way
                ids = [array.pin_memory().to(self._device, non_blocking=True) for array in ids]
            model.rule_out(logits, *ids)

        steps.queue.run(rule_out)

    def _select_ops(self) -> Ops:
        resolved = self._resolved
        num_threads = resolved.config.num_threads or resolved.device.num_threads
        if self._device.type == "cpu":
            torch.set_num_threads(num_threads)
        cpus = sorted(os.sched_getaffinity(0))[:num_threads] if resolved.config.pin_threads else None
        ops = select_ops(self._device, num_threads, resolved.model.head_dim, cpus)
        for name, value in (
            ("quantization", resolved.config.quantization),
            ("kv_cache_dtype", resolved.config.kv_cache_dtype),
        ):
            if value == "int8" and not isinstance(ops, RecordingOps):
                raise ConfigError(f"{name}='int8' needs the native kernels, and {ops.name} serves this model")
        return ops

    def _make_step_model(self, resolved: ResolvedConfig, num_blocks: int) -> StepModel:
        assert self._model is not None
        shape = resolved.model
        kv_cache = self._ops.allocate_kv_cache(
            shape.num_layers,
            num_blocks,
            resolved.block_size,
            shape.num_kv_heads,
            shape.head_dim,
            self._dtype,
            CACHE_DTYPES.get(resolved.config.kv_cache_dtype, self._dtype),
        )
        max_blocks = -(-resolved.max_model_len // resolved.block_size)
        self._slots = SlotTable(resolved.max_num_seqs, max_blocks, self._device)
        self._builder = InputBuilder(self._slots, resolved.block_size)
        return StepModel(
            self._model,
            self._ops,
            kv_cache,
            resolved.block_size,
            self._slots.device_block_table,
            self._slots.last_tokens,
        )

    def _make_steps(self, model: StepModel) -> Steps:
        resolved = self._resolved
        tokens, seqs = resolved.max_num_batched_tokens, resolved.max_num_seqs
        graphs = not resolved.config.enforce_eager
        if isinstance(self._ops, RecordingOps) and graphs:
            return RecordedSteps(model, self._builder, self._ops, StepSizes(tokens, seqs, seqs))
        queue = self._make_queue()
        capacity = StepSizes(tokens, seqs, seqs, model.block_table.numel())
        steps = EagerSteps(model, self._builder, queue, capacity, self._device)
        if graphs and self._ops.captures and queue.run_ahead:
            steps.capture(decode_batch_sizes(seqs))
        return steps

    def _make_queue(self) -> DeviceQueue:
        return CudaQueue(self._device) if self._device.type == "cuda" else CpuQueue()

    def _run_largest_step(self) -> None:
        """A step of the whole token budget over a cache of one block, for its activations' size alone."""
        resolved = self._resolved
        model = self._make_step_model(resolved, 1)
        longest, budget = resolved.max_model_len, resolved.max_num_batched_tokens
        lens = [min(longest, budget - first) for first in range(0, budget, longest)][: resolved.max_num_seqs]
        sizes = StepSizes(sum(lens), len(lens), len(lens))
        steps = EagerSteps(model, self._builder, CpuQueue(), sizes, self._device)
        # Their keys and values all go to block 0, over each other.
        rows = [ScheduledRow(slot, slot, 0, length, [0] * length, [], True) for slot, length in enumerate(lens)]
        steps.logits(self._builder.arrange(SchedulerOutput(0, [], rows, sizes.tokens, [])))
        steps.sample()

    @torch.inference_mode()
    def _compile_all_lengths(self) -> None:
        """Start every variant of the kernels that a later step can: attention's follow the longest row of the step, and
        whether its keys are split among programs, which one row of few or of very many blocks decides."""
        resolved = self._resolved
        assert self._step_model is not None and self._steps is not None
        longest = min(resolved.max_num_batched_tokens, resolved.max_model_len)
        for max_blocks in (1, 1 << 16):
            slots = SlotTable(1, max_blocks, self._device)
            builder = InputBuilder(slots, resolved.block_size)
            model = replace(self._step_model, block_table=slots.device_block_table, last_tokens=slots.last_tokens)
            steps = EagerSteps(model, builder, self._steps.queue, StepSizes(longest, 1, 1), self._device)
            for length in sorted({min(length, longest) for length in (*_ROW_LENGTHS, longest)}):
                if length <= max_blocks * resolved.block_size:
                    # Its keys and values go to block 0, over each other.
                    row = ScheduledRow(0, 0, 0, length, [0] * length, [], True)
                    steps.logits(builder.arrange(SchedulerOutput(0, [], [row], length, [])))
                    steps.sample()
            torch.cuda.synchronize(self._device)


_ROW_LENGTHS = (*range(1, 10), 16, 17, 32, 33, 64, 65, 128)
"""On both sides of every bound by which attention's tiles are chosen."""


def decode_batch_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured: padding wastes at most half of a step below 8 rows, and 8 rows above."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, max_num_seqs + 16, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@torch.inference_mode()
def load_model(resolved: ResolvedConfig, dtype: torch.dtype, device: torch.device, ops: Ops) -> CausalLM:
    """Build the model with its weights. Raises ConfigError for missing, unexpected or mis-shaped tensors."""
    model_config, checkpoint = open_model(Path(resolved.model.path))
    weights = CheckpointWeights(checkpoint, dtype, device, ops, resolved.config.quantization)
    _, model_class = find_architecture(model_config)
    model = model_class(model_config, weights, resolved.max_model_len)
    weights.finish(model_class.ignored_weights(model_config))
    return model
