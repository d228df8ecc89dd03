"""The one way to start a kernel, what it is compiled for, and the watch over late compilation.

Triton compiles a kernel once per *variant*: argument dtypes, which pointers and integers are divisible by 16, the
constants, warps and stages. A variant that was not compiled before the first request stalls that request for a
second or more. Hence three rules: numbers that change from step to step are ``do_not_specialize``, numbers of the
model are constants or strides, and :func:`record` lists what a launcher would start without starting it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from flashserve_kernels.activation import Activation
from flashserve_kernels.gpu.dependent import is_dependent, launch_options
from flashserve_kernels.gpu.device import GPUProperties, gpu_properties, stand_in
from flashserve_kernels.grouped import GroupedFormat

logger = logging.getLogger(__name__)

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "u1",
}

# Products are fused with sums as in CUDA C++. Said aloud, because Triton 3.10 changes the default.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that its kernels' variants follow."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_layers: int = 32
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    activation: Activation = "silu"
    gated: bool = True
    """Whether the activation multiplies another projection."""
    caps_logits: bool = False
    embedding_scale: float = 1.0
    norm_dtype: torch.dtype | None = None
    """Of the norms' weights; None: ``dtype``."""
    weight_formats: tuple[GroupedFormat, ...] = ()
    """Of linears that stay in groups."""


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, apart from the target."""

    name: str
    """Module and function."""
    arguments: tuple[tuple[str, str, bool], ...]
    """Name, type as Triton writes it, and whether the pointer or integer is known to be divisible by 16."""
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    kernel: Any = field(compare=False, repr=False)

    def compile(self, properties: GPUProperties) -> Any:
        """Triton's CompiledKernel for this GPU; needs none. Not in a process whose kernels are interpreted."""
        names = self.kernel.arg_names
        types = {name: type_name for name, type_name, _ in self.arguments}
        aligned = {name for name, _, is_aligned in self.arguments if is_aligned}
        source = ASTSource(
            self.kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}
        options |= launch_options(dict(self.constants))
        return triton.compile(source, target=properties.target, options=options)


_observers: list[Callable[[Variant], None]] = []
_recording = False


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> None:
    """Start a kernel. args: its arguments in order, a tensor first; constants: its ``tl.constexpr`` parameters, but for
    DEPENDENT."""
    if "DEPENDENT" in kernel.arg_names:
        constants["DEPENDENT"] = is_dependent(gpu_properties(args[0].device))
    if _observers:
        variant = _variant(kernel, args, constants, num_warps, num_stages)
        for observer in _observers:
            observer(variant)
    if not _recording:
        kernel[grid](
            *args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **launch_options(constants), **constants
        )


@contextmanager
def observe(observer: Callable[[Variant], None]) -> Iterator[None]:
    """Inside, each launch is reported to the observer before it starts."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def record(properties: GPUProperties, call: Callable[[], object]) -> list[Variant]:
    """What ``call`` would launch on such a GPU, in order. Nothing is launched, so tensors may be of the meta device."""
    global _recording
    found: list[Variant] = []
    before, _recording = _recording, True
    try:
        with stand_in(properties), observe(found.append):
            call()
    finally:
        _recording = before
    return found


def _variant(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> Variant:
    arguments: list[tuple[str, str, bool]] = []
    known = dict(constants)
    unspecialized = _unspecialized(kernel)
    for name, value in zip(kernel.arg_names, args, strict=False):
        specialize = name not in unspecialized
        if value is None or (specialize and type(value) is int and value == 1):
            known[name] = value  # Triton makes these two constants by itself
        else:
            arguments.append((name, *_specialization(value, specialize)))
    function = kernel.fn
    return Variant(
        name=f"{function.__module__}.{function.__qualname__}",
        arguments=tuple(arguments),
        constants=tuple(sorted(known.items())),
        num_warps=warps,
        num_stages=stages,
        kernel=kernel,
    )


def _specialization(value: Any, specialize: bool) -> tuple[str, bool]:
    """The type of a kernel argument, and whether the compiler is told that it is divisible by 16."""
    if isinstance(value, Tensor):
        address = value.storage_offset() * value.itemsize if value.is_meta else value.data_ptr()
        return "*" + TYPES[value.dtype], specialize and address % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int):
        return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64"), specialize and value % 16 == 0
    raise TypeError(f"kernel argument of type {type(value).__name__}")


@functools.cache
def _unspecialized_of(function: Any, names: tuple[str | int, ...]) -> frozenset[str]:
    parameters = list(inspect.signature(function).parameters)
    return frozenset(parameters[name] if isinstance(name, int) else name for name in names)


def _unspecialized(kernel: Any) -> frozenset[str]:
    """Names that the kernel declares ``do_not_specialize``; an interpreted kernel keeps them in its ``kwargs``."""
    names = kernel.do_not_specialize if hasattr(kernel, "do_not_specialize") else kernel.kwargs["do_not_specialize"]
    return _unspecialized_of(kernel.fn, tuple(names or ()))


def mark_warm() -> None:
    """From now on a compilation in this process is logged as a warning: it stalls the requests of its step."""
    knobs = triton.knobs.runtime
    following = knobs.jit_post_compile_hook
    if isinstance(following, _CompileWatch):
        return
    knobs.jit_post_compile_hook = _CompileWatch(following)


def unmark_warm() -> None:
    """End what :func:`mark_warm` began: before another model of the process is warmed up."""
    knobs = triton.knobs.runtime
    if isinstance(knobs.jit_post_compile_hook, _CompileWatch):
        knobs.jit_post_compile_hook = knobs.jit_post_compile_hook.following


class _CompileWatch:
    """Triton's hook after a compilation, also after one that its disk cache answered."""

    def __init__(self, following: Callable[..., Any] | None) -> None:
        self.following = following

    def __call__(self, **event: Any) -> Any:
        function, details = event["fn"], event["compile"]
        names = function.jit_function.arg_names
        constants = {names[path[0]]: value for path, value in details["constants"].items() if len(path) == 1}
        logger.warning(
            "late compilation of %s.%s: arguments %s, constants %s, %d warps, %d stages",
            function.module,
            function.name,
            {name: kind for name, kind in details["signature"].items() if kind != "constexpr"},
            constants,
            details["num_warps"],
            details["num_stages"],
        )
        return self.following(**event) if self.following is not None else None
