"""An engine core on a runner that computes nothing, full of requests, and the time of its decode steps."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

from benchmarks.common.results import percentile
from benchmarks.common.timing import wall_seconds
from flashserve.engine.core import EngineCore
from flashserve.protocol import GenerateRequest, SamplingParams
from flashserve.runner.null_runner import NullRunner
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.config import SchedulerConfig
from flashserve.scheduling.scheduler import Scheduler

BLOCK_SIZE = 16
PARAMS = SamplingParams(temperature=0.0, stop_token_ids=(1, 2))


def make_core(running: int, prompt_len: int, steps: int, waiting: int = 0) -> EngineCore:
    """A core with that many requests, of which ``running`` fit at once and last for twice so many steps."""
    length = prompt_len + 2 * steps
    blocks = BlockManager(running * (length // BLOCK_SIZE + 1), BLOCK_SIZE)
    config = SchedulerConfig(
        max_num_seqs=running,
        max_num_batched_tokens=8192,
        max_model_len=length + 1,
        max_waiting_requests=running + waiting,
        max_waiting_tokens=(running + waiting) * prompt_len,
    )
    core = EngineCore(Scheduler(config, blocks), NullRunner(512))
    for request_id in range(running + waiting):
        prompt = [(request_id * 7 + i) % 500 for i in range(prompt_len)]
        core.handle(GenerateRequest(request_id, prompt, PARAMS, arrival=time.monotonic()))
    return core


def time_decodes(core: EngineCore, running: int, steps: int, step: Callable[[], object]) -> dict[str, float]:
    """What a call of ``step`` takes once every row decodes. What is there by then is kept from the collector, as the
    engine process keeps what it has loaded."""
    while (stats := core.scheduler.stats()).running < running or stats.generation_tokens < running:
        core.step()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.disable()
    times_ms = [1000 * wall_seconds(step) for _ in range(steps)]
    median = statistics.median(times_ms)
    return {
        "median_ms": median,
        "p99_ms": percentile(times_ms, 0.99),
        "max_ms": max(times_ms),
        "us_per_request": 1000 * median / running,
    }
