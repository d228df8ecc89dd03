"""What requests ask of the sampler: one table, by slot, on the device, written when a request is admitted.

A row of it holds a slot's parameters side by side, so that an admission is one small copy and a step that admits nobody
uploads nothing. A new parameter is a row of COLUMNS, and what each kind of ops makes of it in ``sample``.
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


@dataclass(frozen=True)
class Column:
    """A parameter."""

    name: str
    dtype: torch.dtype
    neutral: float
    """What changes nothing: for a slot of no request."""
    of: Callable[[Admission], Any]
    """A request's value."""


def _temperature(admission: Admission) -> float:
    temperature = admission.params.temperature
    return temperature if temperature >= GREEDY_BELOW else 0.0


def _seed(admission: Admission) -> np.int64:
    return np.uint64(admission.seed & 0xFFFF_FFFF_FFFF_FFFF).astype(np.int64)


COLUMNS = (
    Column("temperature", torch.float32, 0.0, _temperature),
    Column("min_p", torch.float32, 0.0, lambda admission: admission.params.min_p),
    Column("top_k", torch.int64, 0, lambda admission: max(0, admission.params.top_k)),
    Column("top_p", torch.float32, 1.0, lambda admission: admission.params.top_p),
    Column("seed", torch.int64, 0, _seed),
)


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
        self.columns = {column.name: self._view(column) for column in COLUMNS}
        """[slots] each: views of the table."""

    def admit(self, admission: Admission) -> None:
        """Start a slot afresh."""
        for column in COLUMNS:
            self._host[column.name][admission.slot] = column.of(admission)
        self._changed.add(admission.slot)

    def upload(self, queue: DeviceQueue) -> None:
        """Apply the admissions since the last step to the device's table."""
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
