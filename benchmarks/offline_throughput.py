"""Offline generation: flashserve.LLM against transformers' generate with a static batch.

    python benchmarks/offline_throughput.py                         # SmolLM2-135M's shape, 16 x (128 in, 64 out)
    python benchmarks/offline_throughput.py --model tinyllama-1.1b --requests 4

Same weights, prompts, dtype and threads, both greedy with SDPA, each in a process of its own with its own defaults,
one after the other in each round: the memory bandwidth of a virtual machine changes from minute to minute, so only
interleaved runs compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from make_random_model import SHAPES, make_random_model

RESULTS = Path(__file__).resolve().parent / "results"


def flashserve_runner(folder: Path, prompts: list[list[int]], args: argparse.Namespace) -> Callable[[], int]:
    """A function that generates once with flashserve and returns the number of tokens."""
    from flashserve import LLM

    llm = LLM(
        folder,
        dtype=args.dtype,
        num_threads=args.threads,
        enable_prefix_caching=False,
        max_model_len=args.input_len + args.output_len,
    )
    params = {"temperature": 0, "max_tokens": args.output_len, "ignore_eos": True}
    return lambda: sum(len(result.token_ids) for result in llm.generate(prompts, params))


def transformers_runner(folder: Path, prompts: list[list[int]], args: argparse.Namespace) -> Callable[[], int]:
    """The same with transformers."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    ).eval()
    batch = torch.tensor(prompts)
    mask = torch.ones_like(batch)

    def generate() -> int:
        with torch.inference_mode():
            tokens = model.generate(
                batch,
                attention_mask=mask,
                max_new_tokens=args.output_len,
                min_new_tokens=args.output_len,
                do_sample=False,
                pad_token_id=0,
            )
        return (tokens.shape[1] - batch.shape[1]) * tokens.shape[0]

    return generate


ENGINES = {"flashserve": flashserve_runner, "transformers": transformers_runner}


def work(name: str, folder: Path, prompts: list[list[int]], args: argparse.Namespace, parent: Connection) -> None:
    """An engine's process: generates once for each message and answers (tokens, seconds)."""
    generate = ENGINES[name](folder, prompts, args)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while parent.recv():
            started = time.perf_counter()
            tokens = generate()
            parent.send((tokens, time.perf_counter() - started))


def measure(folder: Path, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each engine in each round, after one round to warm up."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in ENGINES:
        pipes[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, folder, prompts, args, theirs), daemon=True).start()
        theirs.close()
    speeds: dict[str, list[float]] = {name: [] for name in ENGINES}
    for index in range(args.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            tokens, seconds = pipe.recv()
            if index:
                speeds[name].append(tokens / seconds)
                print(f"round {index}: {name:12s} {tokens / seconds:8.1f} tokens/s", flush=True)
    for pipe in pipes.values():
        pipe.send(False)
    return speeds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help=f"a folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="write the result to benchmarks/results/")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    folder = Path(args.model)
    if args.model in SHAPES:
        folder = make_random_model(args.model, Path(tempfile.gettempdir()) / f"flashserve-random-{args.model}")
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    prompts = [[rng.randrange(3, vocab) for _ in range(args.input_len)] for _ in range(args.requests)]
    speeds = measure(folder, prompts, args)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["flashserve"] / medians["transformers"]
    for name, value in medians.items():
        print(f"{name:12s} median {value:8.1f} tokens/s")
    print(f"ratio        {ratio:.2f}")
    if args.json:
        save(args, speeds, medians, ratio)


def save(args: argparse.Namespace, speeds: dict[str, list[float]], medians: dict[str, float], ratio: float) -> None:
    """One file per run, named by what ran and when."""
    result: dict[str, Any] = {
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "versions": {
            **{name: version(name) for name in ("torch", "transformers")},
            "python": platform.python_version(),
        },
        "cpu": _cpu_name(),
        "tokens_per_second": speeds,
        "median": medians,
        "ratio": ratio,
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"offline-{Path(args.model).name}-{args.requests}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote benchmarks/results/{name}")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
