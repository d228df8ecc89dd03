"""Three ways to run a step: its ops one by one, from a CUDA graph, or from a recorded native program."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from flashserve.runner.device_queue import DeviceQueue
from flashserve.runner.input_builder import Arrangement, InputBuilder
from flashserve.runner.row_lengths import RowLengths
from flashserve.runner.staging import StepFields, StepSizes, array_fields, num_bytes, tensor_fields
from flashserve.runner.step_model import StepModel
from flashserve_kernels import Stage
from flashserve_kernels.recording import LOGITS, SEQS, TOKENS, StepProgram

log = logging.getLogger(__name__)

_PER_TOKEN = ("token_ids", "token_slots", "positions", "slot_mapping")
_PER_SEQ = ("slots", "seq_lens", "query_start_loc")
_PER_ROW = ("logits_rows", "sample_slots", "sample_positions")


class Steps(Protocol):
    """Runs steps, one after the other."""

    queue: DeviceQueue

    def logits(self, step: Arrangement) -> Tensor:
        """Lay out the step's numbers and run the model. Returns [N or more, V]; rows beyond N mean nothing."""
        ...

    def sample(self, stages: Stage) -> Tensor:
        """Sample the logits of the last step; stages: those that any row needs. Returns [N or more] int64."""
        ...


class EagerSteps:
    """Every step as it comes; on a GPU decodes and short prompts beside them may come from CUDA graphs, one per padded
    size. The only ones that pool: an embedding is asked for with a prompt, and hidden states of a whole prompt are more
    rows than graphs and recordings have."""

    pooled: Tensor
    """[rows that pool, hidden] float32: sums of hidden states, of the last step with such rows."""

    def __init__(
        self, model: StepModel, builder: InputBuilder, queue: DeviceQueue, capacity: StepSizes, device: torch.device
    ) -> None:
        self.queue = queue
        self._model = model
        self._builder = builder
        self._device_buffer = queue.run(lambda: torch.zeros(num_bytes(capacity), dtype=torch.uint8, device=device))
        self._decodes: list[_CapturedStep] = []
        self._mixed: list[_CapturedStep] = []
        """From the smallest on."""
        self._sample: Callable[[Stage], Tensor] = self._nothing

    def capture(self, batch_sizes: list[int], mixed_sizes: list[StepSizes]) -> None:
        """Capture decodes of these batch sizes and steps of rows of any length. The largest first: it sets the size of
        the memory that they share. Mixed ones have one tensor of logits, at the price of a copy: 16 tensors for 256
        rows of 152k tokens would keep 1.2 GB."""
        gc.collect()
        gc.freeze()  # torch collects garbage before each capture: 50 times, over everything that was imported
        try:
            shared: Tensor | None = None
            for sizes in sorted(mixed_sizes, key=lambda sizes: sizes.tokens, reverse=True):
                lengths = RowLengths(sizes.tokens, 0, sizes.seqs)
                graph = _CapturedStep.capture(self._model, self.queue, self._device_buffer, sizes, lengths, shared)
                shared = graph.logits if shared is None else shared
                self._mixed.insert(0, graph)
            for batch in sorted(batch_sizes, reverse=True):
                sizes = StepSizes(batch, batch, batch)
                graph = _CapturedStep.capture(self._model, self.queue, self._device_buffer, sizes, RowLengths(1))
                self._decodes.insert(0, graph)
        finally:
            gc.unfreeze()

    def logits(self, step: Arrangement) -> Tensor:
        self._sample = self._nothing  # which held the last step's logits
        graph = self._graph_for(step)
        sizes = step.sizes if graph is None else graph.sizes_with(step.sizes.new_blocks)
        host = self.queue.host_buffer(num_bytes(sizes))
        self._builder.fill(step, array_fields(host, sizes), sizes)
        self.queue.upload(host, self._device_buffer[: host.numel()])
        fields = tensor_fields(self._device_buffer, sizes)
        if sizes.new_blocks:
            self.queue.run(lambda: self._model.update_block_table(fields))
        if graph is not None:
            graph.replay_logits()
            self._sample = graph.sample
            return graph.logits
        lengths = step.lengths
        if step.pooled:
            pooled_lens = [end - first for _, first, end in step.pooled]
            logits, self.pooled = self.queue.run(lambda: self._model.logits_and_pooled(fields, pooled_lens, lengths))
        else:
            logits = self.queue.run(lambda: self._model.logits(fields, lengths))
        self._sample = lambda stages: self.queue.run(lambda: self._model.sample(fields, logits, stages))
        return logits

    def sample(self, stages: Stage) -> Tensor:
        return self._sample(stages)

    def _graph_for(self, step: Arrangement) -> _CapturedStep | None:
        """The smallest graph that holds the step, if none of its rows is pooled."""
        if step.pooled:
            return None
        graphs = self._mixed if step.max_query_len > 1 else self._decodes
        sizes = step.sizes
        return next((graph for graph in graphs if graph.holds(sizes)), None)

    @staticmethod
    def _nothing(stages: Stage) -> Tensor:
        raise RuntimeError("no step was run")


@dataclass(frozen=True)
class _CapturedStep:
    """The model and the sampling of a step of up to these sizes, captured apart: tokens may be ruled out in between.
    The sampling twice, for greedy steps and for all others, whose rows show what else they need."""

    sizes: StepSizes
    replay_logits: Callable[[], None]
    logits: Tensor
    greedy: tuple[Callable[[], None], Tensor]
    every_stage: tuple[Callable[[], None], Tensor]

    @classmethod
    def capture(
        cls,
        model: StepModel,
        queue: DeviceQueue,
        buffer: Tensor,
        sizes: StepSizes,
        lengths: RowLengths,
        shared: Tensor | None = None,
    ) -> _CapturedStep:
        """shared: where the logits go, [N or more, V]; None: where they are made."""
        fields = tensor_fields(buffer, sizes)

        def run() -> Tensor:
            logits = model.logits(fields, lengths)
            return logits if shared is None else shared[: sizes.logits].copy_(logits)

        replay_logits, logits = queue.capture(run)
        greedy = queue.capture(lambda: model.sample(fields, logits, Stage(0)))
        every_stage = queue.capture(lambda: model.sample(fields, logits, model.every_stage))
        return cls(sizes, replay_logits, logits, greedy, every_stage)

    def holds(self, sizes: StepSizes) -> bool:
        own = self.sizes
        return sizes.tokens <= own.tokens and sizes.seqs <= own.seqs and sizes.logits <= own.logits

    def sizes_with(self, new_blocks: int) -> StepSizes:
        """Changed blocks come last in the buffer, so their number moves nothing else."""
        return replace(self.sizes, new_blocks=new_blocks)

    def sample(self, stages: Stage) -> Tensor:
        replay, tokens = self.every_stage if stages else self.greedy
        replay()
        return tokens


class RecordedSteps:
    """Every step of any size from one recording: native operations read the step's sizes when they run."""

    def __init__(self, model: StepModel, builder: InputBuilder, queue: DeviceQueue, capacity: StepSizes) -> None:
        """queue: one that does its work at once."""
        self.queue = queue
        self._builder = builder
        buffer = torch.zeros(num_bytes(capacity), dtype=torch.uint8)
        self._host, self._fields = array_fields(buffer, capacity), tensor_fields(buffer, capacity)
        self._forward = self._new_program(model, capacity)
        with self._forward.recording():
            self._logits = model.logits(self._fields, RowLengths(capacity.tokens))
        self._greedy = self._record_sampling(model, capacity, Stage(0))
        self._every_stage = self._record_sampling(model, capacity, model.every_stage)
        self._sizes = StepSizes(0, 0, 0)
        log.info("recorded a step of %d native operations", len(self._forward.kinds) + len(self._greedy[0].kinds))

    def logits(self, step: Arrangement) -> Tensor:
        self._sizes = step.sizes
        self._builder.fill(step, self._host, self._sizes)
        self._forward.run(*_limits(self._sizes))
        return self._logits

    def sample(self, stages: Stage) -> Tensor:
        program, tokens = self._every_stage if stages else self._greedy
        program.run(*_limits(self._sizes))
        return tokens

    def _record_sampling(self, model: StepModel, capacity: StepSizes, stages: Stage) -> tuple[StepProgram, Tensor]:
        program = self._new_program(model, capacity)
        program.add_input(self._logits, LOGITS)
        with program.recording():
            return program, model.sample(self._fields, self._logits, stages)

    def _new_program(self, model: StepModel, capacity: StepSizes) -> StepProgram:
        program = model.ops.new_program(_limits(capacity))
        _add_inputs(program, self._fields)
        return program


def _limits(sizes: StepSizes) -> tuple[int, int, int]:
    return sizes.tokens, sizes.seqs, sizes.logits


def _add_inputs(program: StepProgram, fields: StepFields) -> None:
    for names, size in ((_PER_TOKEN, TOKENS), (_PER_SEQ, SEQS), (_PER_ROW, LOGITS)):
        for name in names:
            program.add_input(getattr(fields, name), size)
