"""Tokens per second through Triton: against the same engine offline, and with a model that costs nothing.

    python benchmarks/served_throughput.py --model /path/to/model      # served / offline, interleaved
    python benchmarks/served_throughput.py --null MODEL                # the cost of everything but the model

Streams come over gRPC into one asyncio client on this machine, which shares the cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import serving

from flashserve_client import AsyncClient

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64


@dataclass(frozen=True)
class Run:
    """One batch of concurrent streams."""

    tokens_per_s: float
    tokens_per_response: float
    """Median."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder: compare served with offline throughput")
    parser.add_argument("--null", type=Path, help="a model folder whose tokenizer is used with a null device")
    parser.add_argument("--streams", type=int, default=16, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.model is None and args.null is None:
        parser.error("give --model or --null")
    figures: dict[str, Any] = {}
    if args.model is not None:
        figures["model"] = compare(args.model, args.streams, args.rounds)
    if args.null is not None:
        figures["null"] = null_model(args.null)
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(model: Path, streams: int, rounds: int) -> dict[str, Any]:
    """Offline and served in turn, each in processes of its own, idle while the other runs."""
    settings = {"model": str(model.resolve()), "enable_prefix_caching": False, "max_num_seqs": max(16, streams)}
    start, results = multiprocessing.get_context("spawn").Pipe()
    offline = multiprocessing.get_context("spawn").Process(target=run_offline, args=(settings, streams, results))
    offline.start()
    served_runs, offline_rates = [], []
    with serving({"m": settings}) as urls:
        for number in range(rounds + 1):  # the first round warms up
            start.send("go")
            rate = start.recv()
            run = asyncio.run(run_streams(urls.grpc, streams, OUTPUT_TOKENS, prompts(streams)))
            if number:
                offline_rates.append(rate)
                served_runs.append(run)
                print(f"round {number}: offline {rate:.0f}, served {run.tokens_per_s:.0f} tok/s", flush=True)
    start.send("stop")
    offline.join(30)
    ratios = [run.tokens_per_s / rate for run, rate in zip(served_runs, offline_rates, strict=True)]
    return {
        "streams": streams,
        "offline_tokens_per_s": round(statistics.median(offline_rates), 1),
        "served_tokens_per_s": round(statistics.median(run.tokens_per_s for run in served_runs), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "tokens_per_response_median": statistics.median(run.tokens_per_response for run in served_runs),
    }


def run_offline(settings: dict[str, Any], streams: int, pipe: Any) -> None:
    """The offline side: one batch for each "go"."""
    from flashserve import LLM

    with LLM(**settings) as llm:
        while pipe.recv() == "go":
            started = time.perf_counter()
            results = llm.generate(
                prompts(streams), {"temperature": 0, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
            )
            seconds = time.perf_counter() - started
            pipe.send(sum(len(result.token_ids) for result in results) / seconds)


def prompts(count: int) -> list[list[int]]:
    return [[(7 * row + 13 * i) % 500 + 20 for i in range(PROMPT_TOKENS)] for row in range(count)]


async def run_streams(url: str, streams: int, max_tokens: int, token_ids: list[list[int]]) -> Run:
    """All streams at once; the rate is that of all tokens over the time to the last one."""
    sizes: list[int] = []

    async def consume(client: AsyncClient, prompt: list[int]) -> None:
        stream = client.stream(prompt, model="m", max_tokens=max_tokens, temperature=0, ignore_eos=True)
        sizes.extend([delta.completion_tokens async for delta in stream])

    async with AsyncClient(url) as client:
        await client.generate(token_ids[0], model="m", max_tokens=1)
        started = time.perf_counter()
        await asyncio.gather(*(consume(client, token_ids[i % len(token_ids)]) for i in range(streams)))
        seconds = time.perf_counter() - started
    return Run(sum(sizes) / seconds, statistics.median(size for size in sizes if size))


def null_model(tokenizer_folder: Path) -> dict[str, Any]:
    """One token per response at a pace that the stub can just follow; and flat out, where tokens merge."""
    figures: dict[str, Any] = {}
    cases = {"one_by_one": ("null:9", 64, 400), "merged": ("null", 64, 1500)}
    for name, (device, streams, tokens) in cases.items():
        settings = {"model": str(tokenizer_folder.resolve()), "device": device, "max_model_len": 1800}
        with serving({"m": settings}) as urls:
            runs = [asyncio.run(run_streams(urls.grpc, streams, tokens, prompts(streams))) for _ in range(4)][1:]
        figures[name] = {
            "device": device,
            "streams": streams,
            "tokens_per_s": round(statistics.median(run.tokens_per_s for run in runs)),
            "tokens_per_response_median": statistics.median(run.tokens_per_response for run in runs),
        }
    return figures


if __name__ == "__main__":
    main()
