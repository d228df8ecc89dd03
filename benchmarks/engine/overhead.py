"""What a step costs besides the model: scheduling, hashing, stop checks, encoding and sending the outputs.

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

from benchmarks.common.results import percentile
from benchmarks.common.timing import wall_seconds
from benchmarks.engine.core import make_core, start_decoding
from flashserve.ipc.channel import Channel, ChannelClosed
from flashserve.protocol import EngineMessage, StubMessage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=256, help="requests that run at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="decode steps to time (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of each (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    step_ms = _time_steps(args.requests, args.prompt, args.steps)
    figures = {
        "requests": args.requests,
        "median_ms": round(statistics.median(step_ms), 3),
        "p99_ms": round(percentile(step_ms, 0.99), 3),
        "max_ms": round(max(step_ms), 3),
        "us_per_request_and_step": round(statistics.median(step_ms) * 1000 / args.requests, 2),
    }
    print(json.dumps(figures, indent=2))


def _time_steps(num_requests: int, prompt_len: int, steps: int) -> list[float]:
    """Milliseconds of each decode step, messages included."""
    ours, theirs = socket.socketpair()
    receiver = multiprocessing.get_context("fork").Process(target=_receive_until_closed, args=(theirs,), daemon=True)
    receiver.start()
    theirs.close()
    channel: Channel[StubMessage] = Channel(ours, StubMessage)
    core = make_core(num_requests, prompt_len, steps)
    start_decoding(core, num_requests)
    gc.collect()
    gc.freeze()
    gc.disable()

    def step() -> None:
        for message in channel.receive(0):
            core.handle(message)
        channel.send(core.step())

    durations = [1000 * wall_seconds(step) for _ in range(steps)]
    channel.close()
    receiver.join(5)
    return durations


def _receive_until_closed(sock: socket.socket) -> None:
    """What the stub's thread does: decode every message."""
    channel: Channel[EngineMessage] = Channel(sock, EngineMessage)
    try:
        while True:
            channel.receive()
    except ChannelClosed:
        return
