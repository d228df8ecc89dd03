"""What requests ask of the sampler: one table, by slot, on the device, written when a request is admitted.

A row of it holds a slot's parameters side by side, so that an admission is one small copy and a step that admits nobody
uploads nothing. A new parameter is a row of COLUMNS, and a keyword of each ``sample_rows``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashserve.protocol import GREEDY_BELOW
from flashserve.runner.device_queue import DeviceQueue
from flashserve.scheduling.output import Admission
from flashserve_kernels import Stage


@dataclass(frozen=True)
class Column:
    """A parameter."""

    name: str
    dtype: torch.dtype
    neutral: float
    """What changes nothing: for a slot of no request."""
    of: Callable[[Admission], Any]
    """A request's value."""
    stage: Stage
    """What reads it; a request needs the stage if its value is not neutral."""


def temperature_of(admission: Admission) -> float:
    """0 is greedy."""
    temperature = admission.params.temperature
    return temperature if temperature >= GREEDY_BELOW else 0.0


def seed_of(admission: Admission) -> np.int64:
    """The seed in force, as the noise takes it."""
    return np.uint64(admission.seed & 0xFFFF_FFFF_FFFF_FFFF).astype(np.int64)


COLUMNS = (
    Column("temperature", torch.float32, 0.0, temperature_of, Stage.RANDOM),
    Column("min_p", torch.float32, 0.0, lambda admission: admission.params.min_p, Stage.MIN_P),
    Column("top_k", torch.int64, 0, lambda admission: max(0, admission.params.top_k), Stage.TOP_K),
    Column("top_p", torch.float32, 1.0, lambda admission: admission.params.top_p, Stage.TOP_P),
    Column("seed", torch.int64, 0, seed_of, Stage.RANDOM),
)
_NOT_GREEDY = Stage.RANDOM | Stage.MIN_P | Stage.TOP_K | Stage.TOP_P
"""Stages that a greedy row never comes to."""


class SamplerState:
    """The table. On a device that has done its work when a call returns, it is the host's own memory."""

    def __init__(self, num_slots: int, device: torch.device, *, late: bool) -> None:
        """late: whether steps that read the table may be under way while it changes."""
        record = np.dtype([(column.name, _numpy(column.dtype)) for column in COLUMNS], align=True)
        assert record.fields is not None
        self._offsets = {name: place[1] for name, place in record.fields.items()}
        self._host = np.empty(num_slots, record)
        for column in COLUMNS:
            self._host[column.name] = column.neutral
        self._bytes = torch.from_numpy(self._host.view(np.uint8).reshape(num_slots, record.itemsize))
        self._table = self._bytes.to(device, copy=late)
        self._changed: set[int] = set()
        self._stages = np.zeros(num_slots, np.int64)
        self.columns = {column.name: self._view(column) for column in COLUMNS}
        """[slots] each: views of the table."""
        self.every_stage = Stage(0)
        """All that a request may need."""
        for column in COLUMNS:
            self.every_stage |= column.stage

    def admit(self, admission: Admission) -> None:
        """Start a slot afresh."""
        slot, stages = admission.slot, Stage(0)
        greedy = temperature_of(admission) == 0
        for column in COLUMNS:
            unread = greedy and column.stage in _NOT_GREEDY
            self._host[column.name][slot] = column.neutral if unread else column.of(admission)
            if self._host[column.name][slot] != column.neutral:
                stages |= column.stage
        self._stages[slot] = stages
        self._changed.add(slot)

    def stages(self, slots: np.ndarray) -> Stage:
        """Those that any of the slots' requests needs."""
        return Stage(int(np.bitwise_or.reduce(self._stages[slots], initial=0)))

    def upload(self, queue: DeviceQueue) -> None:
        """Apply the admissions since the last upload to the device's table: before a step of any stage."""
        if self._changed and self._table.data_ptr() != self._bytes.data_ptr():
            slots = np.array(sorted(self._changed), np.int64)
            rows = self._bytes.numpy()[slots]
            queue.run(lambda: self._table.index_copy_(0, queue.to_device(slots), queue.to_device(rows)))
        self._changed.clear()

    def _view(self, column: Column) -> torch.Tensor:
        first = self._offsets[column.name]
        return self._table[:, first : first + column.dtype.itemsize].view(column.dtype)[:, 0]


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
