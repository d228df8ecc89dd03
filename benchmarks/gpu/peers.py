"""transformers' continuous batching on the shapes of benchmarks.gpu, in a process of its own.

python -m benchmarks.gpu.peers qwen3-8b 256 128 128      # requests, prompt and output tokens; JSON on the last line
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

from benchmarks.common.results import ROOT
from benchmarks.common.shapes import GPU_SHAPES, SHAPES
from benchmarks.gpu.report import Budget, Report

WORKLOAD = (256, 128, 128)
TIMEOUT_S = 80.0


def measure_peer(report: Report, budget: Budget) -> None:
    """The section "transformers": a shape's figures beside ours, or why there are none."""
    for shape in GPU_SHAPES:
        budget.require(20, f"transformers on {shape}")
        found = _measure(shape, min(TIMEOUT_S, budget.left_s))
        ours = report.get(shape, "throughput {} x {}/{}".format(*WORKLOAD)) or {}
        found["flashserve_tokens_s"] = ours.get("tokens_s")
        report.put("transformers", shape, found)
        report.say(f"   {shape}: {found}")


def _measure(shape: str, timeout_s: float) -> dict[str, Any]:
    if find_spec("transformers") is None:
        return {"missing": "transformers is not installed"}
    command = [sys.executable, "-m", "benchmarks.gpu.peers", shape, *map(str, WORKLOAD)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"missing": f"no result within {timeout_s:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"missing": "it failed", "output": error.stderr.strip().splitlines()[-6:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def generate(shape: str, requests: int, prompt_len: int, output_len: int, device: str = "cuda") -> dict[str, Any]:
    """Generate with random weights on the device: once to warm up, a few tokens, then all of them."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    settings = {key: value for key, value in SHAPES[shape].items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(SHAPES[shape]["model_type"], **settings, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    rng = random.Random(1)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(prompt_len)] for _ in range(requests)]
    batching = ContinuousBatchingConfig(max_requests_per_batch=requests, allow_block_sharing=False)

    def run(tokens: int) -> tuple[float, int]:
        generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        started = time.perf_counter()
        results = model.generate_batch(
            inputs=prompts, generation_config=generation, continuous_batching_config=batching, progress_bar=False
        )
        return time.perf_counter() - started, sum(len(result.generated_tokens) for result in results.values())

    run(4)
    start_s, first_tokens = run(4)  # what each call spends on its cache, warm-up and graphs, and a few tokens
    seconds, tokens = run(output_len)
    return {
        "tokens_s": tokens / seconds,
        "tokens_s_without_start": (tokens - first_tokens) / (seconds - start_s),
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation,
    }


if __name__ == "__main__":
    requests, prompt, output = map(int, sys.argv[2:5])
    print(json.dumps(generate(sys.argv[1], requests, prompt, output)))
