"""Several samples of one prompt: each is what a request of its own with its seed gives."""

from __future__ import annotations

import pytest

from driver import load
from flashserve.engine.core import EngineCore, build_core
from flashserve.protocol import GenerateRequest, SamplingParams
from flashserve.runner.device import CpuDevice
from lazy_device import LazyCpu
from tiny_models import make_tiny_model

ONE_TOKEN = (1,)  # a step of single tokens, captured where that is done, with more samples than rows
MIXED = (1, 15, 16, 17, 40)  # all sides of a block of 16
NUM_TOKENS = 20
N = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def run(core: EngineCore, requests: list[GenerateRequest]) -> dict[tuple[int, int], list[int]]:
    """Tokens by request and sample."""
    tokens: dict[tuple[int, int], list[int]] = {}
    for request in requests:
        core.handle(request)
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return tokens


def request(request_id: int, prompt: list[int], **params) -> GenerateRequest:
    own = {"temperature": 0.9, "seed": 10 * request_id, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return GenerateRequest(request_id, prompt, SamplingParams(**{**own, **params}), arrival=0.0)


@pytest.mark.parametrize("device", ["native", "torch", "late"])
@pytest.mark.parametrize("lengths", [ONE_TOKEN, MIXED])
def test_samples_equal_requests_of_their_own(lengths, device, folder, random_prompts, monkeypatch):
    if device != "late":
        monkeypatch.setenv("FLASHSERVE_KERNELS", device)
    settings = {"dtype": "float32", "max_num_seqs": 12, "max_num_batched_tokens": 32, "max_model_len": 128}
    runner = load(folder, LazyCpu(1) if device == "late" else CpuDevice(), **settings)
    prompts = random_prompts(lengths)
    together = [request(number, prompt, n=N) for number, prompt in enumerate(prompts)]
    core = build_core(runner.resolved, runner, "test")
    found = run(core, together)
    alone = [
        request(N * number + index, prompt, seed=10 * number + index)
        for number, prompt in enumerate(prompts)
        for index in range(N)
    ]
    expected = run(build_core(runner.resolved, runner, "another"), alone)
    assert found == {divmod(number, N): tokens for (number, _), tokens in expected.items()}
    assert len({tuple(tokens) for tokens in found.values()}) == len(found)  # no two agree by chance
    runner.close()


def test_preempted_samples_go_on_as_they_would_have(folder, random_prompts):
    settings = {"dtype": "float32", "max_num_seqs": 6, "max_model_len": 64, "num_gpu_blocks_override": 13}
    runner = load(folder, **settings)
    prompts = random_prompts((20, 30))
    core = build_core(runner.resolved, runner, "test")
    found = run(core, [request(number, prompt, n=N) for number, prompt in enumerate(prompts)])
    assert core.scheduler.stats().preemptions > 0
    for number, prompt in enumerate(prompts):
        for index in range(N):
            own = request(number, prompt, seed=10 * number + index)
            assert found[number, index] == run(build_core(runner.resolved, runner, "alone"), [own])[number, 0]
    runner.close()
