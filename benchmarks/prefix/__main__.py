"""Hit rates of the prefix cache, and what they save of the time to the first token.

    python -m benchmarks.prefix                        # SmolLM2-135M's shape, 2 minutes
    python -m benchmarks.prefix /path/of/model --shared 512,2048

Three ways in which prompts share their beginnings, each with the cache and without, in turn, in this process (LLM):
one after the other, and a burst, of requests with one system prompt; and a conversation, whose every turn repeats what
was said before. A hit rate is the share of prompt tokens that were not computed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import model_folder, new_parser, numbers
from benchmarks.common.machine import describe_machine
from benchmarks.common.results import cpu_result, result_folder, rounded, write_json
from benchmarks.common.tables import markdown
from flashserve import LLM

OWN, OUTPUT = 64, 16  # tokens of a request after what it shares, and of its answer
TURNS = 8


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, "prefix")
    parser.add_argument("model", type=model_folder, nargs="?", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--shared", type=numbers, default=[64, 256, 1024], help="shared tokens (default: 64,256,1024)")
    parser.add_argument("--requests", type=int, default=16, help="that share them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="with new tokens in each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=result_folder("prefix"), help="default: %(default)s")
    return parser.parse_args()


class Bench:
    """One model, with the cache and without."""

    def __init__(self, args: argparse.Namespace) -> None:
        longest = max(*args.shared, TURNS * (OWN + OUTPUT)) + OWN + OUTPUT
        settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": longest, "max_num_seqs": args.requests}
        self._llms = {on: LLM(args.model, enable_prefix_caching=on, **settings) for on in (True, False)}
        self._vocab_size = self._llms[True].limits.vocab_size
        self._args = args
        for llm in self._llms.values():  # what is compiled or allocated at first use is not measured
            llm.generate([[3] * (longest - OUTPUT)], {"max_tokens": 2, "ignore_eos": True})

    def one_after_the_other(self, llm: LLM, rng: random.Random, shared: int) -> list[Any]:
        return [self._generate(llm, [prompt])[0] for prompt in self._prompts(rng, shared)]

    def burst(self, llm: LLM, rng: random.Random, shared: int) -> list[Any]:
        return self._generate(llm, self._prompts(rng, shared))

    def conversation(self, llm: LLM, rng: random.Random, shared: int) -> list[Any]:
        """shared is not used: turns share what was said."""
        said: list[int] = []
        results = []
        for _ in range(TURNS):
            said = said + self._tokens(rng, OWN)
            results += self._generate(llm, [said])
            said = said + results[-1].token_ids
        return results

    def measure(self, name: str, run: Callable[[LLM, random.Random, int], list[Any]], shared: int) -> dict[str, Any]:
        """Medians over all requests of all rounds, of both engines in turn, with the same tokens."""
        found: dict[str, Any] = {"what": name, "shared": shared}
        results: dict[bool, list[Any]] = {True: [], False: []}
        seconds: dict[bool, float] = {True: 0.0, False: 0.0}
        for number in range(self._args.rounds):
            for on, llm in self._llms.items():
                started = time.perf_counter()
                results[on] += run(llm, random.Random(f"{name} {shared} {number}"), shared)
                seconds[on] += time.perf_counter() - started
        prompt_tokens = sum(len(result.prompt_token_ids) for result in results[True])
        found["hit_rate"] = sum(result.timings.cached_tokens for result in results[True]) / prompt_tokens
        for on, key in ((True, "cached"), (False, "computed")):
            times = [result.timings.first_token - result.timings.arrival for result in results[on]]
            found[f"{key}_ttft_ms"] = 1000 * statistics.median(times)
            found[f"{key}_requests_s"] = len(results[on]) / seconds[on]
        return rounded(found)

    def _generate(self, llm: LLM, prompts: Sequence[list[int]]) -> list[Any]:
        return llm.generate(list(prompts), {"temperature": 0, "max_tokens": OUTPUT, "ignore_eos": True})

    def _prompts(self, rng: random.Random, shared: int) -> list[list[int]]:
        beginning = self._tokens(rng, shared)
        return [beginning + self._tokens(rng, OWN) for _ in range(self._args.requests)]

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(3, self._vocab_size) for _ in range(count)]


def main() -> None:
    args = parse_arguments()
    bench, figures = Bench(args), []
    cases = [(name, run, shared) for shared in args.shared for name, run in (
        ("one after the other", bench.one_after_the_other), ("burst", bench.burst)
    )]  # fmt: skip
    cases.append(("conversation", bench.conversation, 0))
    head = ["", "shared tokens", "hit rate", "first token, ms", "without cache", "requests/s", "without cache"]
    rows = [head]
    for name, run, shared in cases:
        found = bench.measure(name, run, shared)
        figures.append(found)
        print(f"{name}, {shared} shared: {found['hit_rate']:.0%} hits", flush=True)
        times = [f"{found[f'{key}_ttft_ms']:.1f}" for key in ("cached", "computed")]
        rates = [f"{found[f'{key}_requests_s']:.1f}" for key in ("cached", "computed")]
        rows.append([name, str(shared or f"{TURNS} turns"), f"{found['hit_rate']:.0%}", *times, *rates])
    print(f"\n{args.requests} requests, {OWN} tokens of their own, {OUTPUT} out; medians of {args.rounds} rounds\n")
    print("\n".join(markdown(rows)))
    machine = describe_machine()
    path = cpu_result(args.out, machine, args.model.name)
    write_json(path, {"machine": machine, "requests": args.requests, "own": OWN, "output": OUTPUT, "figures": figures})
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
