"""How work reaches a device: in order, and on a GPU without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

STEPS_IN_FLIGHT = 2
"""The engine submits one step before it waits for the one before."""
_RING = STEPS_IN_FLIGHT + 1
"""Buffers used in turn: what a step in flight reads is not written by the next one's preparation."""
_DOWNLOADS = 2
"""Of a step at most: its samples, and what it pools."""


class Download(Protocol):
    """Numbers on their way to the host."""

    def result(self) -> Tensor:
        """The numbers, on the host, once they are there."""
        ...


class Mark(Protocol):
    """A point of the device's work, which has a time once the device came by."""

    def seconds_since(self, earlier: Any) -> float:
        """Since a mark of the same queue; to be asked when a download from behind this one has arrived."""
        ...


class DeviceQueue(Protocol):
    """A device that runs what it is given in order. Only ``Download.result`` waits for it."""

    run_ahead: bool
    """Whether work is still under way when these methods return."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Bytes on the host for the next step; those of the steps in flight stay untouched."""
        ...

    def upload(self, host: Tensor, device: Tensor) -> None:
        """Copy the buffer that ``host_buffer`` gave last to the device, before anything that is queued after this."""
        ...

    def to_device(self, array: np.ndarray) -> Tensor:
        """A copy of a few numbers; to be used in what is queued next."""
        ...

    def run(self, function: Callable[[], T]) -> T:
        """Queue what ``function`` does on the device; it is called once, now."""
        ...

    def download(self, tensor: Tensor) -> Download:
        """Fetch a tensor as it is after everything queued so far."""
        ...

    def mark(self) -> Mark | None:
        """The point behind what is queued so far. None: work is done on return, and any clock tells its time."""
        ...

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record what ``function`` queues. Returns (queue it again, the result's tensor, written each time)."""
        ...


class CpuQueue:
    """Implements DeviceQueue for ops that run when they are called."""

    run_ahead = False

    def host_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def upload(self, host: Tensor, device: Tensor) -> None:
        device.copy_(host)

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array)

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def download(self, tensor: Tensor) -> Download:
        return _There(tensor)

    def mark(self) -> None:
        return None

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise NotImplementedError("ops that run when they are called have nothing to capture")


class _There:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def result(self) -> Tensor:
        return self._tensor


class CudaQueue:
    """Implements DeviceQueue with CUDA streams: one for steps, one for each direction of copies, from and to pinned
    buffers. An upload runs beside the step under way, which in one stream with downloads it could not: it would queue
    behind the copy of that step's result. The caller's current stream stays what it is."""

    run_ahead = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute = torch.cuda.Stream(device)
        self._compute.wait_stream(torch.cuda.current_stream(device))  # on which weights and cache are still being made
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._uploads = [_CudaRing(device, self._up) for _ in range(_RING)]
        self._downloads = [_CudaRing(device, self._compute) for _ in range(_RING * _DOWNLOADS)]
        self._pool: Any = None

    def host_buffer(self, num_bytes: int) -> Tensor:
        self._uploads.append(self._uploads.pop(0))
        return self._uploads[-1].host(num_bytes)

    def upload(self, host: Tensor, device: Tensor) -> None:
        # Host → a device buffer of the ring beside the step under way → its place, in 2 µs, after that step.
        buffer = self._uploads[-1]
        staged = buffer.on_device(host.numel())
        with torch.cuda.stream(self._up):
            staged.copy_(host, non_blocking=True)
        self._compute.wait_stream(self._up)
        with torch.cuda.stream(self._compute):
            device.copy_(staged, non_blocking=True)
        # Free again once it was read on the device, not once it has arrived there: that may be a long step earlier.
        buffer.done.record(self._compute)

    def to_device(self, array: np.ndarray) -> Tensor:
        # From pinned memory, or the copy would wait for the steps under way.
        with torch.cuda.stream(self._compute):
            return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def run(self, function: Callable[[], T]) -> T:
        with torch.cuda.stream(self._compute):
            return function()

    def download(self, tensor: Tensor) -> Download:
        # A captured step writes its result to the same place each time: a copy on the device lets the next one start.
        self._downloads.append(self._downloads.pop(0))
        buffer = self._downloads[-1]
        num_bytes = tensor.numel() * tensor.itemsize
        host, staged = buffer.host(num_bytes), buffer.on_device(num_bytes)
        with torch.cuda.stream(self._compute):
            staged.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)
        self._down.wait_stream(self._compute)
        with torch.cuda.stream(self._down):
            host.copy_(staged, non_blocking=True)
        buffer.done.record(self._down)
        return _CudaDownload(host.view(tensor.dtype).view(tensor.shape), buffer.done)

    def mark(self) -> _CudaMark:
        return _CudaMark(self._compute)

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.run(function)  # compiles kernels and makes workspaces, which a capture must not do
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # On the steps' own stream, whose cuBLAS workspace then serves all graphs; other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"):
            result = function()
        self._pool = graph.pool()  # steps run one after the other, so all graphs may share their memory
        return lambda: self.run(graph.replay), result


class _CudaRing:
    """One pinned buffer and one on the device, grown as needed, and when they are free again."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """stream: the one that writes to the device's buffer. In memory allocated for another stream, work of its last
        owner may still be under way."""
        self._device, self._stream = device, stream
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._staged = torch.empty(0, dtype=torch.uint8)
        self.done = torch.cuda.Event()

    def host(self, num_bytes: int) -> Tensor:
        """Waits until what was done with it three steps ago is done, which in the engine's loop it is."""
        self.done.synchronize()
        if self._pinned.numel() < num_bytes:
            self._pinned = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[:num_bytes]

    def on_device(self, num_bytes: int) -> Tensor:
        """After ``host``, so that nobody reads the buffer that a larger one replaces."""
        if self._staged.numel() < num_bytes:
            with torch.cuda.stream(self._stream):
                self._staged = torch.empty(2 * num_bytes, dtype=torch.uint8, device=self._device)
        return self._staged[:num_bytes]


class _CudaDownload:
    def __init__(self, host: Tensor, done: torch.cuda.Event) -> None:
        self._host, self._done = host, done

    def result(self) -> Tensor:
        self._done.synchronize()
        return self._host


class _CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def seconds_since(self, earlier: _CudaMark) -> float:
        return earlier._event.elapsed_time(self._event) / 1000
