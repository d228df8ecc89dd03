"""Triton's interpreter for tests: switched on, and corrected where it differs from every GPU."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import numpy as np
import pytest


def import_interpreted() -> None:
    """Import the kernels so that they are interpreted. To be called before anything imports triton.

    Triton decides when a function is decorated, so the switch is on during the import, and off again for whatever
    this process starts: an engine, or the ahead-of-time compiler, which needs functions that compile.
    """
    if "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(
            "triton was imported before its interpreter could be switched on: run these tests in a process of their own"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import flashserve_kernels.gpu

        for module in pkgutil.iter_modules(flashserve_kernels.gpu.__path__):
            importlib.import_module(f"flashserve_kernels.gpu.{module.name}")
    _correct()


def _correct() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        """Triton's own cuts float32 to bfloat16 without rounding."""
        if (source, target) == (tl.float32, tl.bfloat16):
            return _round_to_bfloat16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, rounding_mode)

    def call(self, *args, **kwargs):
        """A kernel's call of another function, which otherwise replaces all of triton.language each time: 2 ms."""
        if any(tl.core.is_builtin(module.arange) for module in (tl, tl.core) if module in self.fn.__globals__.values()):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    binary_op = interpreter.InterpreterBuilder.binary_op

    def binary_op_of_one_bit(self, lhs, rhs, op):
        """A comparison keeps its operands' type; joined with a tile's mask it became an integer, and no mask."""
        result = binary_op(self, lhs, rhs, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        """Triton 3.6 makes an array of one number an index, which numpy 2.5 refuses; 3.9 squeezes it too."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.binary_op = binary_op_of_one_bit
    interpreter.InterpretedFunction.__call__ = call


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """To nearest even, as uint16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)
