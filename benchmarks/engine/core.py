"""An engine core on a runner that computes nothing, full of requests."""

from __future__ import annotations

import time

from flashserve.engine.core import EngineCore
from flashserve.protocol import GenerateRequest, SamplingParams
from flashserve.runner.null_runner import NullRunner
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.scheduler import Scheduler, SchedulerConfig

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


def start_decoding(core: EngineCore, running: int) -> None:
    """Step until every row decodes."""
    while (stats := core.scheduler.stats()).running < running or stats.generation_tokens < running:
        core.step()
