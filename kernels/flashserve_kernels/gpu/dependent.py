"""Programmatic dependent launch (CUDA, from Hopper on): a kernel's programs are brought up while the one before ends.

Kernels that take part have ``DEPENDENT`` as their last constant and call :func:`wait_for_inputs` first, in every
program: who ends without having waited would let the kernel after the next begin before this one's inputs are complete.
A kernel that takes no part, cuBLAS's for example, waits as always for all that came before it.

Off unless the environment says ``FLASHSERVE_DEPENDENT_LAUNCH=1``, until a GPU has measured what it brings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashserve_kernels.gpu.device import GPUProperties

SWITCH = "FLASHSERVE_DEPENDENT_LAUNCH"
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Let the next kernel be brought up, which waits in its turn, and wait until the one before has written all."""
    if DEPENDENT and not _INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()


def is_dependent(properties: GPUProperties) -> bool:
    """Whether kernels that can are launched so on this GPU."""
    return properties.has_dependent_launch and os.environ.get(SWITCH) == "1"


def launch_options(constants: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler must be told of a kernel with these constants."""
    return {"launch_pdl": True} if constants.get("DEPENDENT") else {}
