"""What a step costs besides the model: scheduling, hashing, stop checks, encoding and sending the outputs.

Runs the engine's own loop on a runner that computes nothing, with a second process that receives and decodes as
the stub does. Prints the distribution of the time between two steps' ends.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket

from benchmarks.common.results import rounded
from benchmarks.engine.core import make_core, time_decodes
from flashserve.ipc.channel import Channel, ChannelClosed
from flashserve.protocol import EngineMessage, StubMessage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=256, help="requests that run at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="decode steps to time (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of each (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    ours, theirs = socket.socketpair()
    receiver = multiprocessing.get_context("fork").Process(target=_receive_until_closed, args=(theirs,), daemon=True)
    receiver.start()
    theirs.close()
    channel: Channel[StubMessage] = Channel(ours, StubMessage)
    core = make_core(args.requests, args.prompt, args.steps)

    def step() -> None:
        for message in channel.receive(0):
            core.handle(message)
        channel.send(core.step())

    figures = time_decodes(core, args.requests, args.steps, step)
    channel.close()
    receiver.join(5)
    print(json.dumps(rounded({"requests": args.requests, **figures}), indent=2))


def _receive_until_closed(sock: socket.socket) -> None:
    """What the stub's thread does: decode every message."""
    channel: Channel[EngineMessage] = Channel(sock, EngineMessage)
    try:
        while True:
            channel.receive()
    except ChannelClosed:
        return
