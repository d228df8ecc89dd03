"""Runs a model's steps on a device. Implements Runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flashserve.config import ResolvedConfig
from flashserve.models.model_input import CausalLM
from flashserve.protocol import SamplingParams
from flashserve.runner.device import Device
from flashserve.runner.device_queue import DeviceQueue, Download, Mark
from flashserve.runner.input_builder import Arrangement, InputBuilder
from flashserve.runner.kv_cache import kv_cache_spec
from flashserve.runner.logits_processor import LogitsProcessor
from flashserve.runner.logprobs import LogprobRows, LogprobSlots
from flashserve.runner.slots import SlotTable
from flashserve.runner.staging import StepSizes
from flashserve.runner.step_model import StepModel
from flashserve.runner.steps import EagerSteps, RecordedSteps, Steps
from flashserve.scheduling.output import MAX_SCORED_TOKENS, Admission, ScheduledRow, SchedulerOutput, StepResult
from flashserve_kernels import Ops
from flashserve_kernels.token_mask import num_words


@dataclass(frozen=True)
class StepHandle:
    """A step on its way."""

    num_rows: int
    sample_rows: np.ndarray
    """[N]: the plan's rows that sample."""
    tokens: Download
    """[N or more] int64: the samples, and what else ``logprobs`` takes apart."""
    logprobs: LogprobRows | None = None
    pooled_rows: Sequence[int] = ()
    """Those of the plan's rows that pool."""
    pooled: Download | None = None
    """[their number, hidden] float32."""
    begin: Mark | None = None
    end: Mark | None = None
    """Around the step's work on a device that runs late."""

    @property
    def device_s(self) -> float | None:
        """Once the samples are there."""
        return None if self.begin is None or self.end is None else self.end.seconds_since(self.begin)


class ModelRunner:
    """A loaded model, its KV cache and the state of its slots. Use from one thread."""

    @torch.inference_mode()
    def __init__(self, model: CausalLM, resolved: ResolvedConfig, device: Device, ops: Ops) -> None:
        """Allocates the KV cache and what lives between steps; captures or records steps."""
        self.resolved = resolved
        self._device = device
        self._ops = ops
        queue = device.make_queue()
        self.run_ahead = queue.run_ahead
        self._slots = SlotTable.for_engine(resolved, device.torch_device, late=queue.run_ahead)
        self._logprobs = LogprobSlots(resolved.max_num_seqs)
        self._builder = InputBuilder(self._slots, resolved.block_size)
        self._processor = LogitsProcessor(resolved.max_num_seqs, resolved.model.vocab_size, ops, device.torch_device)
        spec = kv_cache_spec(resolved.config, resolved.model, resolved.kv_scales)
        self.step_model = StepModel.build(model, ops, spec, resolved.num_blocks, self._slots)
        device.synchronize()  # the queue's streams are older than the cache, whose zeros may still be on their way
        self._steps = self._make_steps(queue)
        self._pooling_steps = self._make_pooling_steps(queue)
        self.observe_logits: Callable[[Arrangement, Tensor], None] | None = None
        """Called with each step's logits [N or more, V] before they are sampled, in the queue of the step's work."""
        self._closed = False

    @torch.inference_mode()
    def submit(self, plan: SchedulerOutput) -> StepHandle:
        """Start the step; on a CPU it is done on return."""
        if self._closed:
            raise RuntimeError("the runner is closed")
        self._processor.follow(plan)
        for admission in plan.admissions:
            self._logprobs.admit(admission)
        step = self._builder.arrange(plan)
        asked = self._logprobs.rows(step)
        queue, sampler = self._steps.queue, self._slots.sampler
        begin = queue.mark()
        stages = sampler.stages(step.sample_slots)
        if stages:
            sampler.upload(queue)
        if plan.block_copies:
            pairs = np.array(plan.block_copies, np.int64)
            queue.run(lambda: self.step_model.copy_blocks(queue.to_device(pairs)))
        steps = self._pooling_steps if step.pooled else self._steps
        logits = steps.logits(step)
        pooled_rows = [place for place, _, _ in step.pooled]
        pooled = queue.download(self._pooling_steps.pooled) if step.pooled else None
        if not step.sizes.logits:
            # Waited for all the same: steps of a long prompt would else pile up on a GPU and reuse buffers too early.
            end, tokens = queue.mark(), queue.download(self._slots.last_tokens[:1])
            return StepHandle(len(plan.rows), step.plan_rows, tokens, None, pooled_rows, pooled, begin, end)
        raw = None if asked is None else asked.copy_logits(queue, logits)
        observe = self.observe_logits
        if observe is not None:
            queue.run(lambda: observe(step, logits))
        if plan.token_masks:
            masked = _token_masks(plan, step, logits.shape[1])
            queue.run(lambda: self._ops.mask_logits_(logits, *map(queue.to_device, masked)))
        early = self._slots.early_ends(step.sample_slots, step.sample_positions)
        if early is not None:
            queue.run(lambda: self._ops.mask_tokens_(logits, *map(queue.to_device, early)))
        counted = self._processor.apply(queue, logits, step)
        samples = steps.sample(stages)
        if counted is not None:
            self._processor.count(queue, counted, samples)
        if asked is not None and raw is not None:
            samples = asked.compute(queue, self._ops, raw, samples)
        end, tokens = queue.mark(), queue.download(samples)
        return StepHandle(len(plan.rows), step.plan_rows, tokens, asked, pooled_rows, pooled, begin, end)

    def wait(self, handle: StepHandle) -> StepResult:
        """The samples, on the host."""
        token_ids: list[list[int]] = [[] for _ in range(handle.num_rows)]
        numbers = handle.tokens.result()
        if handle.logprobs is None:
            tokens = numbers[: len(handle.sample_rows)].tolist()
            result = StepResult(token_ids, device_s=handle.device_s)
        else:
            tokens, of_samples, of_prompts = handle.logprobs.unpack(numbers)
            result = StepResult(token_ids, of_samples, of_prompts, device_s=handle.device_s)
        for row, token in zip(handle.sample_rows.tolist(), tokens, strict=True):
            token_ids[row] = [token]
        if handle.pooled is None:
            return result
        return replace(result, pooled=dict(zip(handle.pooled_rows, handle.pooled.result().numpy(), strict=True)))

    def warm_up(self) -> None:
        """Run a prefill and some decode steps, so that the first request pays for no lazy initialisation."""
        resolved = self.resolved
        vocab = resolved.model.vocab_size
        num_tokens = min(resolved.max_num_batched_tokens, resolved.block_size, resolved.max_model_len)
        for temperature in (0.0, 1.0):
            params = SamplingParams(temperature=temperature, top_p=0.9, logprobs=1)
            admission = Admission(0, 0, params, 0, num_tokens, ())
            row = ScheduledRow(0, 0, 0, num_tokens, [i % vocab for i in range(num_tokens)], [0], 1)
            self.wait(self.submit(SchedulerOutput(0, [admission], [row], num_tokens, [])))
            # The same token again: its key and value are written once more to the same place.
            decode = ScheduledRow(0, 0, num_tokens - 1, 1, [], [], 1)
            copies = [(0, resolved.num_blocks - 1)] if resolved.num_blocks > 1 else []
            masks = [(0, b"\xff" * 4 * num_words(vocab))]
            self.wait(self.submit(SchedulerOutput(1, [], [decode], 1, [], copies, token_masks=masks)))
        if self._device.row_lengths:
            self._compile_all_lengths()

    def close(self) -> None:
        """Free the model and the cache. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._device.synchronize()  # a step may be under way in the memory that is freed here
        del self._steps, self._pooling_steps, self.step_model
        self._device.release()

    def _make_steps(self, queue: DeviceQueue) -> Steps:
        resolved, model = self.resolved, self.step_model
        tokens, seqs = resolved.max_num_batched_tokens, resolved.max_num_seqs
        rows = seqs + MAX_SCORED_TOKENS
        eager = resolved.config.enforce_eager
        if self._ops.records and not eager:
            return RecordedSteps(model, self._builder, queue, StepSizes(tokens, seqs, rows))
        capacity = StepSizes(tokens, seqs, rows, model.block_table.numel(), tokens)
        steps = EagerSteps(model, self._builder, queue, capacity, self._device.torch_device)
        if self._ops.captures and queue.run_ahead and not eager:
            mixed = [StepSizes(size, min(size, seqs), min(size, seqs)) for size in mixed_step_sizes(tokens)]
            steps.capture(decode_batch_sizes(seqs), mixed)
        return steps

    def _make_pooling_steps(self, queue: DeviceQueue) -> EagerSteps:
        """What runs steps with embeddings: where all are recorded, those are not."""
        if isinstance(self._steps, EagerSteps):
            return self._steps
        tokens, seqs = self.resolved.max_num_batched_tokens, self.resolved.max_num_seqs
        rows = seqs + MAX_SCORED_TOKENS
        capacity = StepSizes(tokens, seqs, rows, self.step_model.block_table.numel(), tokens)
        return EagerSteps(self.step_model, self._builder, queue, capacity, self._device.torch_device)

    @torch.inference_mode()
    def _compile_all_lengths(self) -> None:
        """Start every variant of the kernels that a later step can: attention's follow the longest row of the step, and
        whether its keys are split among programs, which one row of few or of very many blocks decides."""
        resolved, device = self.resolved, self._device.torch_device
        longest = min(resolved.max_num_batched_tokens, resolved.max_model_len)
        for max_blocks in (1, 1 << 16):
            slots = SlotTable(1, max_blocks, device)
            builder = InputBuilder(slots, resolved.block_size)
            model = replace(
                self.step_model,
                block_table=slots.device_block_table,
                last_tokens=slots.last_tokens,
                sampler=slots.sampler.columns,
            )
            steps = EagerSteps(model, builder, self._steps.queue, StepSizes(longest, 1, 1), device)
            for length in sorted({min(length, longest) for length in (*self._device.row_lengths, longest)}):
                if length <= max_blocks * resolved.block_size:
                    # Its keys and values go to block 0, over each other.
                    row = ScheduledRow(0, 0, 0, length, [0] * length, [], 1)
                    logits = steps.logits(builder.arrange(SchedulerOutput(0, [], [row], length, [])))
                    steps.sample(model.every_stage)
                    self._steps.queue.run(partial(self._processor.compile, logits))
            self._device.synchronize()


def _token_masks(plan: SchedulerOutput, step: Arrangement, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits [M, words] int32, rows of the logits [M] int64)."""
    places = {row: place for place, row in enumerate(step.plan_rows.tolist())}
    bits = np.zeros((len(plan.token_masks), num_words(vocab_size)), np.int32)
    for words, (_, mask) in zip(bits, plan.token_masks, strict=True):
        given = np.frombuffer(mask, np.int32)[: len(words)]  # a tokenizer may know more tokens than the model
        words[: len(given)] = given
    return bits, np.array([places[row] for row, _ in plan.token_masks], np.int64)


def decode_batch_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured: padding wastes at most half of a step below 8 rows, and 8 rows above."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, max_num_seqs + 16, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def mixed_step_sizes(max_num_batched_tokens: int) -> list[int]:
    """Tokens of the mixed steps that are captured: those in which starting the kernels one by one may take the host
    longer than they take the GPU. Up to 512 tokens at most 63 are computed in vain, then at most a fifth."""
    sizes = [*range(64, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256)]
    return sorted({min(size, max_num_batched_tokens) for size in sizes})
