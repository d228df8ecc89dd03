"""An implementation of the ops, case by case: how exact, how fast, and what of the device's ceilings it reaches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.op_cases import Bound, Case, Inputs
from benchmarks.common.timing import Timer
from flashserve_kernels import Ops
from flashserve_kernels.recording import LOGITS, SEQS, TOKENS

ROUNDINGS = 4.0  # machine epsilons that a result may be off
SAME_TOKENS = 0.98  # float32 logarithms differ by a last place: tokens whose scores are that close may change places
CPU_COPIES_BYTES, MOST_COPIES = 300e6, 512  # of weights, or keys and values: no cache of a host holds so much
MANY_ROWS = 128  # a product of more takes long, and hardly notices where its weight comes from


def measure(
    case: Case, ops: Ops, dtype: torch.dtype, timer: Timer, ceilings: tuple[float, float] | None, copies: int = 1
) -> dict[str, Any]:
    """Of one call: the error, time and rates, and the time of torch's ops. ceilings: bytes and FLOP per second."""
    found = check(case, ops, dtype)
    inputs = Inputs(ops.device, dtype, dtype)
    both = {each: case.bind(each, inputs, copies) for each in (ops, Ops(ops.device))}
    calls = len(both[ops].calls)
    ours, torchs = (seconds / calls for seconds in timer.seconds(*itertools.starmap(runner, both.items())))
    return found | speed(case, ours, ceilings) | {"torch_us": torchs * 1e6}


def speed(case: Case, seconds: float, ceilings: tuple[float, float] | None) -> dict[str, float]:
    """Time and rates, and the share of the ceiling that is nearer: memory's or arithmetic's."""
    moved, computed = case.num_bytes / seconds, case.flops / seconds
    found = {"us": seconds * 1e6, "gb_s": moved / 1e9}
    if computed:
        found["tflop_s"] = computed / 1e12
    if ceilings:
        found["of_ceiling"] = max(moved / ceilings[0], computed / ceilings[1])
    return found


def check(case: Case, ops: Ops, dtype: torch.dtype) -> dict[str, Any]:
    """The error against torch's ops in float64; of tokens, how many are the same."""
    device = ops.device
    ours = _results(case.bind(ops, Inputs(device, dtype, dtype), 1))
    exact = _results(case.bind(Ops(device), Inputs(device, dtype, torch.float64), 1))
    if not ours[0].is_floating_point():
        share = float((ours[0] == exact[0]).double().mean())
        return {"same_tokens": share, "correct": share >= SAME_TOKENS}
    error = max(relative_error(_last(a, case.rows, len(e)), e) for a, e in zip(ours, exact, strict=True))
    return {"error": error, "correct": error <= (case.limit or ROUNDINGS * torch.finfo(ours[0].dtype).eps)}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the larger of the value and the tensor's typical magnitude."""
    scale = exact.abs().clamp(min=float(exact.abs().mean()) or 1.0)
    return float(((actual.double() - exact) / scale).abs().max())


def cpu_copies(case: Case) -> int:
    """How many copies keep a CPU's caches from holding what a step reads anew; a GPU's is flushed by the timer."""
    most = MOST_COPIES if case.flops <= 2 * MANY_ROWS * case.num_bytes else 4
    return max(1, min(most, int(CPU_COPIES_BYTES / case.num_bytes)))


def runner(ops: Ops, bound: Bound) -> Callable[[], None]:
    """Runs all calls: replayed, where steps are."""
    if not ops.records:

        def run() -> None:
            for call in bound.calls:
                call()

        return run
    inputs = {TOKENS: bound.tokens, SEQS: bound.seqs, LOGITS: bound.logits}
    tokens, seqs, logits = (len(tensors[0]) if tensors else 1 for tensors in inputs.values())
    program = ops.new_program((tokens, seqs, logits))
    for size, tensors in inputs.items():
        for tensor in tensors:
            program.add_input(tensor, size)
    with program.recording():
        for call in bound.calls:
            call()
    return lambda: program.run(tokens, seqs, logits)


def _results(bound: Bound) -> tuple[Tensor, ...]:
    found = bound.calls[0]()
    return found if isinstance(found, tuple) else (found,)


def _last(x: Tensor, rows: int, count: int) -> Tensor:
    """Of each of ``rows`` equal sequences the last tokens, ``count`` in all."""
    return x.unflatten(0, (rows, -1))[:, -(count // rows) :].flatten(0, 1)
