"""What a step costs besides the model: scheduling, hashing, stop checks, encoding and sending the outputs.

    python benchmarks/engine_overhead.py

Runs the engine's own loop on a runner that computes nothing, with a second process that receives and decodes as
the stub does. Prints the distribution of the time between two steps' ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import socket
import statistics
import time
from pathlib import Path

from flashserve.engine.core import EngineCore
from flashserve.ipc.channel import Channel, ChannelClosed
from flashserve.protocol import EngineMessage, GenerateRequest, SamplingParams, StubMessage
from flashserve.runner.null_runner import NullRunner
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.scheduler import Scheduler, SchedulerConfig

BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256, help="requests that run at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="decode steps to time (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    step_ms = sorted(time_steps(args.requests, args.prompt, args.steps))
    figures = {
        "requests": args.requests,
        "median_ms": round(statistics.median(step_ms), 3),
        "p99_ms": round(step_ms[int(len(step_ms) * 0.99)], 3),
        "max_ms": round(step_ms[-1], 3),
        "us_per_request_and_step": round(statistics.median(step_ms) * 1000 / args.requests, 2),
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def time_steps(num_requests: int, prompt_len: int, steps: int) -> list[float]:
    """Milliseconds of each decode step, messages included."""
    ours, theirs = socket.socketpair()
    receiver = multiprocessing.get_context("fork").Process(target=receive_until_closed, args=(theirs,), daemon=True)
    receiver.start()
    theirs.close()
    channel: Channel[StubMessage] = Channel(ours, StubMessage)
    core = make_core(num_requests, prompt_len, steps)
    while core.scheduler.stats().running < num_requests or core.scheduler.stats().generation_tokens < num_requests:
        core.step()
    gc.collect()
    gc.freeze()
    gc.disable()
    durations = []
    for _ in range(steps):
        started = time.perf_counter()
        for message in channel.receive(0):
            core.handle(message)
        channel.send(core.step())
        durations.append((time.perf_counter() - started) * 1000)
    channel.close()
    receiver.join(5)
    return durations


def make_core(num_requests: int, prompt_len: int, steps: int) -> EngineCore:
    length = prompt_len + 2 * steps
    blocks = BlockManager(num_requests * (length // BLOCK_SIZE + 1), BLOCK_SIZE)
    config = SchedulerConfig(max_num_seqs=num_requests, max_num_batched_tokens=8192, max_model_len=length + 1)
    core = EngineCore(Scheduler(config, blocks), NullRunner(512))
    params = SamplingParams(temperature=0.0, stop_token_ids=(1, 2))
    for request_id in range(num_requests):
        prompt = [(request_id * 7 + i) % 500 for i in range(prompt_len)]
        core.handle(GenerateRequest(request_id, prompt, params, arrival=time.monotonic()))
    return core


def receive_until_closed(sock: socket.socket) -> None:
    """What the stub's thread does: decode every message."""
    channel: Channel[EngineMessage] = Channel(sock, EngineMessage)
    try:
        while True:
            channel.receive()
    except ChannelClosed:
        return


if __name__ == "__main__":
    main()
