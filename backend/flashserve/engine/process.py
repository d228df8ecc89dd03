"""The engine process: loads the model, then steps while there is work and sleeps while there is none.

Started by the stub's supervisor with one end of a socket. One thread does everything: a busy second thread would
cost the steps a third of their speed (they share the interpreter's lock), and a sleeping one would gain nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import time

import msgspec
import psutil

from flashserve.config import EngineConfig, ResolvedConfig
from flashserve.engine.core import EngineBroken, EngineCore
from flashserve.engine.loading import load_engine
from flashserve.engine.pacing import PrefillPacing
from flashserve.engine.timeline import Timeline
from flashserve.errors import INTERNAL, FlashserveError
from flashserve.ipc.channel import Channel, ChannelClosed
from flashserve.protocol import EngineFailed, EngineLimits, EngineReady, ErrorInfo, StubMessage
from flashserve.stub_processes import trace_file

log = logging.getLogger("flashserve.engine")

PR_SET_PDEATHSIG = 1
HELD_POLL_S = 0.005  # how often deadlines are looked at while every request waits for something outside the engine
IDLE_COLLECT_S = 10.0  # garbage is collected while idle, never in a step: a full collection takes up to 50 ms


def main(argv: list[str] | None = None) -> int:
    """Entry of ``python -m flashserve.engine``; the exit status is for the log only."""
    parser = argparse.ArgumentParser(prog="flashserve.engine", description="The engine process of one model.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the connected socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the stub; this process ends with it")
    parser.add_argument("--config", required=True, help="the EngineConfig as JSON")
    args = parser.parse_args(argv)
    _end_with_parent(args.parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the stub decides when to end
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until there is something to trace
    faulthandler.register(signal.SIGUSR1)  # kill -USR1: every thread's stack goes to the log, also of a hung step
    config = msgspec.json.decode(args.config, type=EngineConfig)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname).1s engine[{os.path.basename(config.model)}] %(message)s",
        stream=sys.stderr,
    )
    os.set_inheritable(args.fd, False)  # a process started from here must not keep the connection open
    channel: Channel[StubMessage] = Channel(socket.socket(fileno=args.fd), StubMessage)
    try:
        return _run(config, channel)
    except ChannelClosed:
        log.info("the stub closed the connection: ending")
        return 0
    finally:
        channel.close()  # at once: what is left of the interpreter's end may take seconds


def _run(config: EngineConfig, channel: Channel[StubMessage]) -> int:
    started = time.monotonic()
    try:
        resolved, core = load_engine(config)
    except FlashserveError as error:
        log.error("%s", error.message)
        channel.send(EngineFailed(ErrorInfo(error.code, error.message)))
        return 1
    except Exception as error:
        log.exception("loading failed")
        channel.send(EngineFailed(ErrorInfo(INTERNAL, f"loading failed: {type(error).__name__}: {error}")))
        return 1
    log.info("ready after %.1f s: %s", time.monotonic() - started, resolved.summary())
    if resolved.device.computes_on_cpu or resolved.device.kind == "cuda":
        core.pacing = PrefillPacing(resolved.max_num_batched_tokens)
    core.timeline = timeline = Timeline()
    signal.signal(signal.SIGUSR2, lambda *_: timeline.write(trace_file(os.getpid())))  # flashserve trace
    channel.send(EngineReady(engine_limits(resolved), resolved.model.card))
    gc.collect()
    gc.freeze()  # the model's objects never become garbage: later collections need not visit them
    gc.disable()
    try:
        serve(channel, core)
    except EngineBroken as error:
        log.critical("%s: ending, so that a new engine can start", error)
    return 2


def serve(channel: Channel[StubMessage], core: EngineCore) -> None:
    """Until the channel closes: take messages in, step, send what came of it."""
    while True:
        for message in _receive(channel, core):
            core.handle(message)
        outputs = core.step()
        channel.send(outputs)


def _receive(channel: Channel[StubMessage], core: EngineCore) -> list[StubMessage]:
    """Messages, without waiting while there is work. Idle time is for the garbage collector."""
    if core.has_work:
        return channel.receive(HELD_POLL_S if core.is_held else 0)
    while True:
        messages = channel.receive(IDLE_COLLECT_S)
        if messages:
            return messages
        gc.collect()


def engine_limits(resolved: ResolvedConfig) -> EngineLimits:
    """What the stub is told about the engine."""
    return EngineLimits(
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        block_size=resolved.block_size,
        num_blocks=resolved.num_blocks,
        vocab_size=resolved.model.vocab_size,
        eos_token_ids=resolved.model.eos_token_ids,
        dtype=resolved.dtype,
        device=resolved.device.name,
        stream_interval=resolved.stream_interval,
        hidden_size=resolved.model.hidden_size,
        model_bytes=resolved.device.used_bytes or psutil.Process().memory_info().rss,
        kv_cache_bytes=resolved.kv_cache_bytes,
    )


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the stub's supervisor thread ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        raise SystemExit(0)
