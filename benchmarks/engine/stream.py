"""Responses per second through Triton with a model that costs nothing, one token each and merged.

64 streams come over gRPC into one asyncio client on this machine, which shares the cores with the server: once at a
pace that the stub can just follow, where each response carries a token; once flat out, where the sender lags behind the
engine and tokens of a request leave merged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from functools import partial
from typing import Any

from benchmarks.common.arguments import model_folder
from benchmarks.common.peers.run_flashserve_served import stream_tokens
from benchmarks.common.protocol import Requests, Run
from benchmarks.common.serving import serving
from benchmarks.common.streaming import run_users
from flashserve_client import AsyncClient

PROMPT_TOKENS = 128
CASES = {"one by one": ("null:9", 400), "merged": ("null", 1500)}
"""Device, and output tokens of each stream: steps of 9 ms are at most 7,111 tokens/s."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model_folder, help="whose tokenizer is used: a folder, or smollm2-135m")
    parser.add_argument("--streams", type=int, default=64, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    figures: dict[str, Any] = {}
    for name, (device, tokens) in CASES.items():
        print(f"{name}: device {device}, {args.streams} streams of {tokens} tokens", flush=True)
        figures[name] = {"device": device, "streams": args.streams, **_measure(args, device, tokens)}
    print(json.dumps(figures, indent=2))


def _measure(args: argparse.Namespace, device: str, tokens: int) -> dict[str, Any]:
    settings = {"model": str(args.model), "device": device, "max_model_len": 1800}
    with serving({"m": settings}) as urls:
        runs = [asyncio.run(_run_streams(urls.grpc, args.streams, tokens)) for _ in range(args.rounds + 1)][1:]
    # The rate is that of all tokens over the time to the last one.
    sizes = [[size for responses in run.responses for _, size in responses] for run in runs]
    return {
        "tokens_per_s": round(statistics.median(run.tokens_per_s for run in runs)),
        "responses_per_s": round(
            statistics.median(len(each) / run.seconds for each, run in zip(sizes, runs, strict=True))
        ),
        "tokens_per_response_median": statistics.median(map(statistics.median, sizes)),
    }


async def _run_streams(url: str, streams: int, max_tokens: int) -> Run:
    """All streams at once."""
    prompts = [[(7 * row + 13 * i) % 500 + 20 for i in range(PROMPT_TOKENS)] for row in range(streams)]
    async with AsyncClient(url, model="m") as client:
        await client.generate(prompts[0], max_tokens=1)
        requests = Requests(prompts, [max_tokens] * streams, [0.0] * streams)
        return await run_users(streams, requests, partial(stream_tokens, client))
