"""Runs native operations, one by one or recorded into a program that one call replays.

A recorded program is the CPU's counterpart of a CUDA graph: the model's Python code runs once, its operations are
kept with the addresses of their tensors, and each step is one native call over them. Sizes that differ from step to
step (tokens, sequences, rows of logits) are not in the operations; they are given to each run.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flashserve_kernels.cpu.library import load_library
from flashserve_kernels.cpu.memory import Arena
from flashserve_kernels.recording import SEQS, TOKENS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""abi.h's fs_dtype."""

KINDS = (
    "embedding", "add_embedding", "norm", "linear", "activation", "rope_cache", "attention", "sample", "gather_tokens",
    "scatter_tokens", "pack_linear", "quantize", "pack_grouped", "quantize_groups", "embedding_grouped",
    "linear_grouped", "mask_logits",
)  # fmt: skip
"""abi.h's fs_kind, by name."""
(
    EMBEDDING, ADD_EMBEDDING, NORM, LINEAR, ACTIVATION, ROPE_CACHE, ATTENTION, SAMPLE, GATHER_TOKENS, SCATTER_TOKENS,
    PACK_LINEAR, QUANTIZE, PACK_GROUPED, QUANTIZE_GROUPS, EMBEDDING_GROUPED, LINEAR_GROUPED, MASK_LOGITS,
) = range(len(KINDS))  # fmt: skip
"""abi.h's fs_kind."""

_ALIGNMENT = 64


class Op(ctypes.Structure):
    """abi.h's fs_op."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("seqs", ctypes.c_int32),
        ("p", ctypes.c_void_p * 12),
        ("i", ctypes.c_int64 * 16),
        ("f", ctypes.c_double * 4),
    )


class Pool:
    """The native threads; the caller's is one of them. Use from one thread."""

    def __init__(self, isa: str, num_threads: int, cpus: list[int] | None = None, sanitize: bool = False) -> None:
        """cpus: one CPU number per thread to pin it to. Raises NativeUnavailable, ValueError for a bad number."""
        self.library = load_library(isa, sanitize)
        if self.library.fs_op_size() != ctypes.sizeof(Op):
            raise RuntimeError("fs_op differs between abi.h and program.py")
        pins = None if cpus is None else np.array(cpus, np.int32).ctypes.data_as(ctypes.c_void_p)
        self._handle = self.library.fs_pool_new(num_threads, pins)
        if not self._handle:
            raise ValueError(f"cannot make {num_threads} threads")
        self.num_threads = num_threads
        self.arena = Arena()
        """For weights."""
        self.close = weakref.finalize(self, self.library.fs_pool_free, self._handle)

    def run(self, ops: ctypes.Array[Op], dims: np.ndarray, seconds: np.ndarray | None = None) -> None:
        """Run the operations in order. dims: [3] int64; seconds: [number of operations] float64, added to."""
        if not self.close.alive:
            raise RuntimeError("the pool is closed")
        times = None if seconds is None else seconds.ctypes.data
        self.library.fs_run(self._handle, ctypes.byref(ops), len(ops), dims.ctypes.data, len(dims), times)


@dataclass
class Program:
    """A recorded list of operations, and the memory that they use."""

    pool: Pool
    capacity: tuple[int, int, int]
    """The largest sizes that it can run: tokens, sequences, rows of logits."""
    _ops: list[Op] = field(default_factory=list)
    _inputs: dict[int, int] = field(default_factory=dict)
    """Data address of an input → which size its first dimension has."""
    _size_of: dict[int, int] = field(default_factory=dict)
    """The same by storage address, for the program's own memory, of which operations see views."""
    _kept: list[Tensor] = field(default_factory=list)
    _free: dict[int, list[np.ndarray]] = field(default_factory=dict)
    _array: ctypes.Array[Op] | None = None

    def add_input(self, tensor: Tensor, size: int) -> None:
        """Declare a tensor that the caller fills before each run: its first dimension is TOKENS, SEQS or LOGITS."""
        self._inputs[tensor.data_ptr()] = size
        self._kept.append(tensor)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it operations are recorded instead of run."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)
        self._array = (Op * len(self._ops))(*self._ops)

    def run(self, num_tokens: int, num_seqs: int, num_logits: int, seconds: np.ndarray | None = None) -> None:
        """Replay for a step of these sizes."""
        sizes = (num_tokens, num_seqs, num_logits)
        if self._array is None or any(size > limit for size, limit in zip(sizes, self.capacity, strict=True)):
            raise ValueError(f"a program of capacity {self.capacity} cannot run {sizes}")
        self.pool.run(self._array, np.array(sizes, np.int64), seconds)

    @property
    def kinds(self) -> list[int]:
        """The operations' kinds, for profiles."""
        return [op.kind for op in self._ops]

    def _record(self, op: Op, tensors: tuple[Tensor, ...]) -> None:
        self._ops.append(op)
        self._kept.extend(tensors)

    def _size(self, tensor: Tensor) -> int:
        size = self._inputs.get(tensor.data_ptr(), self._size_of.get(_storage(tensor)))
        if size is None:
            raise RuntimeError("an operation that cannot be recorded made one of this operation's inputs")
        return size

    def _empty(self, size: int, columns: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for the largest step. It returns to the free list when the last tensor on it is gone: the model's
        own references decide, as they do with an allocator."""
        shape = (self.capacity[size], *columns)
        num_bytes = -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        free = self._free.setdefault(num_bytes, [])
        memory = free.pop() if free else _aligned(num_bytes)
        # A view of its own for each use: its end is the end of the use.
        view = memory[:]
        weakref.finalize(view, free.append, memory).atexit = False
        tensor = torch.from_numpy(view)[: int(np.prod(shape)) * dtype.itemsize].view(dtype).view(shape)
        self._size_of[_storage(tensor)] = size
        return tensor


# Like a CUDA stream's capture mode: operations are called from model code that knows nothing of it.
_recording: ContextVar[Program | None] = ContextVar("recording", default=None)


def recording_program() -> Program | None:
    """The program that operations are being recorded into."""
    return _recording.get()


@dataclass(frozen=True)
class Rows:
    """How many rows an operation has: the number now, and where a program finds it in later runs."""

    size: int
    count: int


def rows_of(tensor: Tensor) -> Rows:
    """The rows of a tensor's first dimension."""
    program = recording_program()
    return Rows(TOKENS if program is None else program._size(tensor), tensor.shape[0])


def empty(rows: Rows, columns: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor [rows, *columns] for an operation's result."""
    program = recording_program()
    if program is not None:
        return program._empty(rows.size, columns, dtype)
    return (
        torch.from_numpy(_aligned(int(np.prod((rows.count, *columns))) * dtype.itemsize))
        .view(dtype)
        .view(rows.count, *columns)
    )


def emit(
    pool: Pool,
    kind: int,
    dtype: torch.dtype,
    rows: Rows,
    pointers: tuple[Tensor | None, ...],
    integers: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
    seqs: Rows | None = None,
) -> None:
    """Run an operation now, or record it. pointers: the tensors' data addresses go into ``p`` in this order."""
    op = Op(kind=kind, dtype=DTYPES[dtype], rows=rows.size, seqs=SEQS if seqs is None else seqs.size)
    for index, tensor in enumerate(pointers):
        op.p[index] = None if tensor is None else tensor.data_ptr()
    for index, integer in enumerate(integers):
        op.i[index] = integer
    for index, number in enumerate(floats):
        op.f[index] = number
    program = recording_program()
    if program is not None:
        program._record(op, tuple(t for t in pointers if t is not None and _is_foreign(program, t)))
        return
    dims = np.zeros(3, np.int64)
    dims[op.seqs] = 0 if seqs is None else seqs.count
    dims[op.rows] = rows.count
    pool.run((Op * 1)(op), dims)


def _is_foreign(program: Program, tensor: Tensor) -> bool:
    """Weights and caches are kept alive by the program; its own memory must be free to return to the free list."""
    return _storage(tensor) not in program._size_of


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _aligned(num_bytes: int) -> np.ndarray:
    """Uninitialised bytes that begin on a cache line."""
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes]
