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
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.common.arguments import add_json, model_folder
from benchmarks.common.results import write_json
from benchmarks.common.serving import serving
from flashserve_client import AsyncClient

PROMPT_TOKENS = 128
CASES = {"one by one": ("null:9", 400), "merged": ("null", 1500)}
"""Device, and output tokens of each stream: steps of 9 ms are at most 7,111 tokens/s."""


@dataclass(frozen=True)
class Run:
    """One batch of concurrent streams."""

    tokens_per_s: float
    responses_per_s: float
    tokens_per_response: float
    """Median."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model_folder, help="whose tokenizer is used: a folder, or smollm2-135m")
    parser.add_argument("--streams", type=int, default=64, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default: %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    figures: dict[str, Any] = {}
    for name, (device, tokens) in CASES.items():
        print(f"{name}: device {device}, {args.streams} streams of {tokens} tokens", flush=True)
        figures[name] = {"device": device, "streams": args.streams, **_measure(args, device, tokens)}
    print(json.dumps(figures, indent=2))
    if args.json:
        write_json(args.json, figures)


def _measure(args: argparse.Namespace, device: str, tokens: int) -> dict[str, Any]:
    settings = {"model": str(args.model), "device": device, "max_model_len": 1800}
    with serving({"m": settings}) as urls:
        runs = [asyncio.run(_run_streams(urls.grpc, args.streams, tokens)) for _ in range(args.rounds + 1)][1:]
    return {
        "tokens_per_s": round(statistics.median(run.tokens_per_s for run in runs)),
        "responses_per_s": round(statistics.median(run.responses_per_s for run in runs)),
        "tokens_per_response_median": statistics.median(run.tokens_per_response for run in runs),
    }


async def _run_streams(url: str, streams: int, max_tokens: int) -> Run:
    """All streams at once; the rate is that of all tokens over the time to the last one."""
    sizes: list[int] = []

    async def consume(client: AsyncClient, prompt: list[int]) -> None:
        stream = client.stream(prompt, model="m", max_tokens=max_tokens, temperature=0, ignore_eos=True)
        sizes.extend([delta.completion_tokens async for delta in stream])

    prompts = [[(7 * row + 13 * i) % 500 + 20 for i in range(PROMPT_TOKENS)] for row in range(streams)]
    async with AsyncClient(url) as client:
        await client.generate(prompts[0], model="m", max_tokens=1)
        started = time.perf_counter()
        await asyncio.gather(*(consume(client, prompt) for prompt in prompts))
        seconds = time.perf_counter() - started
    carrying = [size for size in sizes if size]
    return Run(sum(sizes) / seconds, len(carrying) / seconds, statistics.median(carrying))
