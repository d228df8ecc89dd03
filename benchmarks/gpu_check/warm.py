"""Compiles what the check's models start, in parallel.

    python -m benchmarks.gpu_check.warm --cache DIR qwen3-8b llama

A shape of benchmarks.gpu, or a family of the tests' tiny models, whose checkpoints are of three dtypes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common.shapes import GPU_SHAPES, SHAPES, TINY_SHAPE

# As tests/gpu/test_greedy.py and benchmarks.gpu.models set what kernels depend on.
TEST_SETTINGS: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "max_model_len": 256}
BENCH_SETTINGS: dict[str, Any] = {"max_model_len": 8192 + 64, "max_num_seqs": 256}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--gpu", help="the one of this machine without it")
    parser.add_argument("--most", type=int, help="so many kernels alone")
    args = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(args.cache)
    from flashserve.runner.ahead import find_gpu
    from flashserve_kernels.gpu.warm import warm

    properties = find_gpu(args.gpu)
    variants = [variant for name in args.models for variant in variants_of(name, properties)]
    started, failed = time.perf_counter(), 0
    for found in warm(properties, islice(dict.fromkeys(reversed(variants)), args.most)):
        failed += found.error is not None
        print(f"{found.seconds:6.1f} s  {found.variant.name} {found.error or ''}", flush=True)
    print(f"all in {time.perf_counter() - started:.1f} s, {failed} failed")
    return 1 if failed else 0


def variants_of(name: str, properties: Any) -> Iterator[Any]:
    """What benchmarks.gpu starts of a shape, or the tests of a family."""
    from benchmarks.gpu.models import RandomFiles
    from flashserve.config import EngineConfig
    from flashserve.models.registry import open_model
    from flashserve.runner.ahead import start_variants

    if name in (*GPU_SHAPES, "tiny"):
        shape = TINY_SHAPE if name == "tiny" else SHAPES[name]
        settings: dict[str, Any] = {"max_model_len": 128} if name == "tiny" else BENCH_SETTINGS
        yield from start_variants(RandomFiles(shape), EngineConfig("random", device="cuda", **settings), properties)
        return
    from tiny_models import make_tiny_model  # type: ignore[import-not-found]  # of tests/support

    for dtype in ("float32", "float16", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            config = EngineConfig(str(make_tiny_model(name, folder)), dtype=dtype, device="cuda", **TEST_SETTINGS)
            yield from start_variants(open_model(config), config, properties)


if __name__ == "__main__":
    sys.exit(main())
