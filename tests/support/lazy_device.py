"""A device that does what it is given in order, but late: for tests of running ahead without a GPU.

Numbers that the host overwrites too early, or reads too early, come out wrong.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashserve.config import EngineConfig
from flashserve.runner.device import CpuDevice
from flashserve.runner.device_queue import STEPS_IN_FLIGHT, DeviceQueue
from flashserve_kernels import AttentionBatch, Ops
from flashserve_kernels.kv_cache import KVLayer


class LazyQueue:
    """Implements DeviceQueue. Work waits in a queue of which a random part is done at each call."""

    run_ahead = True

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._work: deque[Callable[[], Any]] = deque()
        self._buffers = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(STEPS_IN_FLIGHT + 1)]
        self.replays = 0
        self.sent_bytes = 0
        """By ``to_device``."""
        self.most_waiting = 0
        self.clock = 0.0
        """The device's own, in seconds; whoever computes moves it on."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        self._buffers.append(self._buffers.pop(0))
        return self._buffers[-1][:num_bytes]

    def upload(self, host: Tensor, device: Tensor) -> None:
        self._queue(lambda: device.copy_(host))

    def to_device(self, array: np.ndarray) -> Tensor:
        self.sent_bytes += array.nbytes
        return torch.from_numpy(array.copy())

    def run(self, function: Callable[[], Any]) -> Any:
        self._drain(len(self._work))
        return function()

    def download(self, tensor: Tensor) -> _LateDownload:
        download = _LateDownload(self, torch.full_like(tensor, -(1 << 40)))
        self._queue(lambda: download.arrive(tensor))
        return download

    def mark(self) -> _LateMark:
        mark = _LateMark()
        self._queue(lambda: mark.pass_by(self.clock))
        return mark

    def work_once(self) -> None:
        """Do the oldest piece of work."""
        self._drain(1)

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = function()

        def replay() -> None:
            self.replays += 1
            self._queue(lambda: result.copy_(function()))

        return replay, result

    def _queue(self, work: Callable[[], Any]) -> None:
        self._work.append(work)
        self.most_waiting = max(self.most_waiting, len(self._work))
        if self._rng.random() < 0.3:
            self._drain(self._rng.randint(0, len(self._work)))

    @torch.inference_mode()
    def _drain(self, count: int) -> None:
        for _ in range(count):
            self._work.popleft()()


class _LateMark:
    seconds: float | None = None

    def pass_by(self, seconds: float) -> None:
        self.seconds = seconds

    def seconds_since(self, earlier: _LateMark) -> float:
        assert self.seconds is not None and earlier.seconds is not None, "asked before the device came by"
        return self.seconds - earlier.seconds


class _LateDownload:
    def __init__(self, queue: LazyQueue, copy: Tensor) -> None:
        self._queue, self._copy = queue, copy
        self._arrived = False

    def arrive(self, tensor: Tensor) -> None:
        self._copy.copy_(tensor)
        self._arrived = True

    def result(self) -> Tensor:
        while not self._arrived:
            self._queue.work_once()
        return self._copy


class CapturableOps(Ops):
    """The torch ops as a GPU's are: they take lengths from the device's tensors and leave padding alone."""

    captures = True

    def paged_attention(
        self,
        q: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        real = batch.seq_lens > 0
        rows = int(real.sum())
        lens = batch.query_start_loc.diff()[:rows].tolist()
        assert bool(real[:rows].all()), "padding comes last"
        own = replace(
            batch,
            block_tables=batch.block_tables[:rows],
            seq_lens=batch.seq_lens[:rows],
            host_query_lens=lens,
            host_seq_lens=batch.seq_lens[:rows].tolist(),
        )
        out = q.new_zeros((q.shape[0], q.shape[1] * q.shape[2]))
        if rows:
            out[: sum(lens)] = super().paged_attention(q[: sum(lens)], cache, own, scale, window, softcap)
        return out


class LazyCpu(CpuDevice):
    """A CPU whose steps run late."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.queue = LazyQueue(seed)

    def select_ops(self, config: EngineConfig, head_dim: int) -> Ops:
        torch.set_num_threads(1)
        return CapturableOps(self.torch_device)

    def make_queue(self) -> DeviceQueue:
        return self.queue
