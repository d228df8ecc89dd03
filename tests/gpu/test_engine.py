"""Running ahead, compilation and memory of the engine on a GPU."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from driver import Engine, load, random_prompts
from flashserve import LLM
from flashserve.protocol import Abort
from flashserve.runner.device import open_device
from tiny_models import make_tiny_model

LENGTHS = (3, 20, 45, 33, 7, 60, 16, 31)
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def start(folder, device):
    engines: list[Engine] = []

    def make(**settings) -> Engine:
        defaults = {"max_num_seqs": 6, "max_num_batched_tokens": 32, "max_model_len": 256}
        runner = load(folder, open_device(device), **{**defaults, **settings})
        engines.append(Engine(runner, max_tokens=NUM_TOKENS))
        return engines[-1]

    yield make
    for engine in engines:
        engine.core.close()


@pytest.fixture
def expected(start) -> list[list[int]]:
    """The tokens of requests that are computed one after the other, without graphs."""
    engine = start(enforce_eager=True)
    for index, prompt in enumerate(random_prompts(LENGTHS)):
        engine.add(index, prompt)
        engine.finish()
    return [engine.tokens[index] for index in range(len(LENGTHS))]


@pytest.mark.parametrize("seed", range(3))
def test_aborts_while_steps_are_under_way(seed, start, expected):
    """Six slots for eight requests: slots of the aborted are used again while the step they were in is under way."""
    engine, rng = start(), random.Random(seed)
    for index, prompt in enumerate(random_prompts(LENGTHS)):
        engine.add(index, prompt)
    gone = rng.sample(range(len(LENGTHS)), 3)
    for request_id in gone:
        for _ in range(rng.randint(3, 9)):
            engine.step()
        engine.core.handle(Abort([request_id]))
    late = random_prompts([12, 50], seed=9)
    for request_id, prompt in enumerate(late, 100):
        engine.add(request_id, prompt)
    engine.finish()
    for index, tokens in enumerate(expected):
        assert engine.tokens[index] == (tokens[: len(engine.tokens[index])] if index in gone else tokens)
    for request_id, prompt in enumerate(late, 100):
        alone = start(enforce_eager=True)
        alone.add(request_id, prompt)
        alone.finish()
        assert engine.tokens[request_id] == alone.tokens[request_id]


def test_preemption_while_a_step_is_under_way(start, expected):
    engine = start(num_gpu_blocks_override=18, enable_prefix_caching=False)
    assert engine.generate(random_prompts(LENGTHS)) == expected
    assert engine.core.scheduler.stats().preemptions > 0


def test_chunks_of_a_long_prompt_that_sample_nothing(start):
    """Many steps without a sample follow each other: none may overwrite the numbers of those still under way."""
    prompts = random_prompts([200])
    whole, chunked = start(max_num_batched_tokens=256, enforce_eager=True), start(max_num_batched_tokens=8)
    assert whole.generate(prompts) == chunked.generate(prompts)


def test_seeded_samples_do_not_depend_on_graphs_or_neighbours(start):
    params = [
        {"temperature": 0.9, "seed": 7, "top_k": 20},
        {"temperature": 1.1, "seed": 8, "top_p": 0.8, "min_p": 0.01},
    ]
    prompts = random_prompts(LENGTHS)
    together = start()
    for index, prompt in enumerate(prompts):
        together.add(index, prompt, **params[index % 2], min_tokens=5, stop_token_ids=(3, 4))
    together.finish()
    alone = start(enforce_eager=True)
    for index, prompt in enumerate(prompts):
        alone.add(index, prompt, **params[index % 2], min_tokens=5, stop_token_ids=(3, 4))
        alone.finish()
    assert together.tokens == alone.tokens


@pytest.mark.parametrize("family, dtype", [("llama", "float16"), ("mistral", "float32"), ("gpt2", "float16")])
def test_nothing_is_compiled_after_the_start(family, dtype, tmp_path, device, caplog):
    folder = make_tiny_model(family, tmp_path, dtype=dtype)
    rng = random.Random(0)
    with LLM(folder, device=device, max_num_seqs=20, max_num_batched_tokens=300, max_model_len=1000) as llm:
        with caplog.at_level(logging.WARNING, logger="flashserve_kernels"):
            for lengths in ([1], [2] * 20, [5] * 3, [8], [9], [17] * 4, [65], [700], rng.choices(range(1, 400), k=40)):
                prompts = random_prompts(lengths, seed=len(lengths))
                params = [
                    {
                        "temperature": rng.choice([0, 0.8]),
                        "top_p": rng.choice([1, 0.9]),
                        "top_k": rng.choice([0, 5]),
                        "min_tokens": rng.choice([0, 3]),
                        "max_tokens": rng.randint(3, 30),
                    }
                    for _ in prompts
                ]
                llm.generate(prompts, params)
                llm.generate([[*prompt, 7, 8] for prompt in prompts], params)  # a prefix and a few tokens more
        late = [record.getMessage() for record in caplog.records if "late compilation" in record.getMessage()]
    assert late == []


def test_the_watch_sees_a_late_compilation(device, caplog):
    """The test before this one can fail."""
    from flashserve_kernels.gpu import activation, launch

    launch.mark_warm()
    try:
        with caplog.at_level(logging.WARNING, logger="flashserve_kernels"):
            activation.activate_and_mul(torch.ones(2, 2 * 1237, device=device), "silu")
    finally:
        launch.unmark_warm()
    assert any("late compilation" in record.getMessage() for record in caplog.records)


def test_memory_stays_within_its_share(tmp_path, device):
    """8 KB of KV cache per token, and requests enough to fill any share of 3 GB."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
    folder = make_tiny_model("llama", tmp_path, dtype="float16", **sizes)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = 3e9 / total
    settings = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 2048}
    with LLM(folder, device=device, gpu_memory_utilization=share, **settings) as llm:
        loaded = free - torch.cuda.mem_get_info()[0]
        llm.generate(random_prompts([1500] * 100), {"temperature": 0, "max_tokens": 4, "ignore_eos": True})
        used = free - torch.cuda.mem_get_info()[0]
    print(f"{loaded / 1e9:.2f} GB after loading, {used / 1e9:.2f} GB after generating, of {3.0:.2f} GB")
    assert 0.7 * 3e9 <= used <= 3e9


def test_a_tiny_run_of_the_benchmark(tmp_path):
    sections = ["ceilings", "attention", "kernels", "smollm2-135m"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output", str(tmp_path), "--sections", *sections]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout and "failure" not in done.stdout, done.stdout
