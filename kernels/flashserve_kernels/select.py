"""Which implementation of the ops serves a device."""

from __future__ import annotations

import logging
import os

import torch

from flashserve_kernels.ops import Ops

log = logging.getLogger(__name__)

OVERRIDE = "FLASHSERVE_KERNELS"
"""Environment variable: torch, triton, native, or native:ISA such as native:avx2. For tests and for finding faults."""


def select_ops(
    device: torch.device,
    num_threads: int,
    head_dim: int,
    cpus: list[int] | None = None,
    *,
    batch_invariant: bool = False,
) -> Ops:
    """Triton-lang on a GPU; on a CPU C++ where it can be built, else torch with a warning that says what is lost.

    num_threads: compute threads on a CPU; head_dim: the model's; cpus: one CPU number per thread to pin it to;
    batch_invariant: ops that are so, where there are any (``Ops.is_batch_invariant``). Raises
    ValueError for an override that names nothing, and NativeUnavailable where an override cannot be had.
    """
    wanted, _, isa = os.environ.get(OVERRIDE, "").partition(":")
    if wanted not in ("", "torch", "triton", "native"):
        raise ValueError(f"{OVERRIDE} must be torch, triton, native or native:ISA, not {wanted!r}")
    if wanted == "torch":
        return Ops(device)
    if wanted == "triton" or (not wanted and device.type != "cpu"):
        return triton_ops(device, batch_invariant)
    return _native_ops(device, num_threads, head_dim, cpus, isa, must=bool(wanted))


def triton_ops(device: torch.device, batch_invariant: bool) -> Ops:
    """The ops in Triton-lang."""
    from flashserve_kernels.gpu.ops import BatchInvariantOps, TritonOps

    return (BatchInvariantOps if batch_invariant else TritonOps)(device)


def _native_ops(
    device: torch.device, num_threads: int, head_dim: int, cpus: list[int] | None, isa: str, must: bool
) -> Ops:
    from flashserve_kernels.cpu.library import NativeUnavailable, supported_isas
    from flashserve_kernels.cpu.ops import NativeOps

    supported = supported_isas()
    if isa and isa not in supported:
        raise NativeUnavailable(f"this processor cannot run {isa!r}; it can run {', '.join(supported)}")
    reason = f"heads of {head_dim} numbers are not a multiple of 16" if head_dim % 16 else None
    for candidate in [isa] if isa else supported:
        if reason is not None:
            break
        try:
            return NativeOps(candidate, num_threads, cpus)
        except NativeUnavailable as error:
            # The kernel may refuse AMX although the processor has it; the next instruction set then serves.
            if candidate == supported[-1] or isa or "compiler" in str(error):
                reason = str(error)
    if must:
        raise NativeUnavailable(str(reason))
    log.warning("running on torch's own ops, at a third of the speed or less: %s", reason)
    return Ops(device)
