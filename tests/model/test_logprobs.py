"""Log-probabilities are transformers' log-softmax in float32: in chunks, after prefix hits, preempted, run ahead."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from driver import load
from flashserve.engine.core import EngineCore, build_core
from flashserve.protocol import GenerateRequest, SamplingParams, TokenLogprob
from flashserve.runner.device import CpuDevice
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import MAX_SCORED_TOKENS
from flashserve_kernels import Ops
from lazy_device import LazyCpu

LENGTHS = (1, 20, 45, 150, 16)
NUM_TOKENS = 9
SETTINGS = {"dtype": "float32", "max_num_seqs": 12, "max_num_batched_tokens": 32, "max_model_len": 256}
TOLERANCE = 1e-3


@dataclass
class Answer:
    """What came of one sample."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0


def run(core: EngineCore, requests: list[GenerateRequest]) -> dict[tuple[int, int], Answer]:
    found: dict[tuple[int, int], Answer] = {}
    for request in requests:
        core.handle(request)
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            answer = found.setdefault((output.request_id, output.index), Answer())
            answer.tokens += output.token_ids
            if output.timings is not None:
                answer.cached = output.timings.cached_tokens
            if output.logprobs is not None:
                assert len(output.logprobs.tokens) in (0, len(output.token_ids))
                answer.logprobs += output.logprobs.tokens
                answer.prompt += output.logprobs.prompt
    return found


def request(number: int, prompt: list[int], **params) -> GenerateRequest:
    own = {"temperature": 0.9, "seed": number, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return GenerateRequest(number, prompt, SamplingParams(**{**own, **params}), arrival=0.0)


@pytest.fixture(scope="module")
def log_softmax(folder):
    """``log_softmax(tokens)``: [T, V] float32, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def compute(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    return compute


def check(found: list[TokenLogprob], tokens: list[int], expected: torch.Tensor, num_top: int) -> None:
    """``tokens[i]`` was chosen by ``expected[i]``, [V]."""
    assert len(found) == len(tokens) == len(expected)
    for one, token, every in zip(found, tokens, expected, strict=True):
        assert one.logprob == pytest.approx(float(every[token]), abs=TOLERANCE)
        assert one.rank == pytest.approx(1 + int((every > every[token]).sum()), abs=1)  # neighbours may be a hair apart
        assert len(one.top) == num_top
        for (alternative, logprob), best in zip(one.top, every.topk(num_top).values.tolist(), strict=True):
            assert logprob == pytest.approx(best, abs=TOLERANCE)
            assert logprob == pytest.approx(float(every[alternative]), abs=TOLERANCE)


def start(folder, device: str, monkeypatch, **settings) -> ModelRunner:
    if device != "late":
        monkeypatch.setenv("FLASHSERVE_KERNELS", device)
    return load(folder, LazyCpu(3) if device == "late" else CpuDevice(), **{**SETTINGS, **settings})


@pytest.mark.parametrize("device", ["native", "torch", "late"])
def test_of_samples_and_of_prompts_also_in_chunks_and_after_prefix_hits(
    device, folder, log_softmax, random_prompts, monkeypatch
):
    prompts = random_prompts(LENGTHS)
    runner = start(folder, device, monkeypatch)
    core = build_core(runner.resolved, runner, "test")
    asked = [
        request(number, prompt, logprobs=(0, 5, 20)[number % 3], prompt_logprobs=(2, None, 0)[number % 3])
        for number, prompt in enumerate(prompts)
    ]
    silent = request(50, prompts[2])
    again = [
        request(100 + number, prompt, logprobs=1, temperature=0.0, prompt_logprobs=number % 2 or None)
        for number, prompt in enumerate(prompts)
    ]
    answers = run(core, [*asked, silent]) | run(core, again)
    assert not answers[50, 0].logprobs and not answers[50, 0].prompt
    assert answers[102, 0].cached == 32, "the second time prompts are found in the cache"
    assert answers[103, 0].cached == 0, "unless all of their logits are asked for"
    for one in [*asked, *again]:
        answer, prompt, params = answers[one.request_id, 0], one.prompt_token_ids, one.params
        expected = log_softmax(prompt + answer.tokens)
        check(answer.logprobs, answer.tokens, expected[len(prompt) - 1 : -1], params.logprobs)
        if params.prompt_logprobs is None:
            assert not answer.prompt
        else:
            check(answer.prompt, prompt[1:], expected[: len(prompt) - 1], params.prompt_logprobs)
    runner.close()


@pytest.mark.parametrize("device", ["native", "late"])
def test_preempted_samples_lose_none_and_repeat_none(device, folder, log_softmax, random_prompts, monkeypatch):
    runner = start(folder, device, monkeypatch, num_gpu_blocks_override=16, enable_prefix_caching=False)
    core = build_core(runner.resolved, runner, "test")
    prompts = random_prompts((30, 40, 60, 70, 20))
    asked = [
        request(number, prompt, logprobs=2, prompt_logprobs=1, max_tokens=40) for number, prompt in enumerate(prompts)
    ]
    answers = run(core, asked)
    assert core.scheduler.stats().preemptions > 0
    for number, prompt in enumerate(prompts):
        answer = answers[number, 0]
        expected = log_softmax(prompt + answer.tokens)
        check(answer.logprobs, answer.tokens, expected[len(prompt) - 1 : -1], 2)
        check(answer.prompt, prompt[1:], expected[: len(prompt) - 1], 1)
    runner.close()


@pytest.mark.parametrize("device", ["native", "late"])
def test_each_of_several_samples_has_its_own(device, folder, log_softmax, random_prompts, monkeypatch):
    runner = start(folder, device, monkeypatch)
    core = build_core(runner.resolved, runner, "test")
    prompts = random_prompts((1, 17, 40))
    answers = run(
        core, [request(10 * i, prompt, n=3, logprobs=3, prompt_logprobs=1) for i, prompt in enumerate(prompts)]
    )
    assert len({tuple(answer.tokens) for answer in answers.values()}) == 9
    for (number, index), answer in answers.items():
        prompt = prompts[number // 10]
        expected = log_softmax(prompt + answer.tokens)
        check(answer.logprobs, answer.tokens, expected[len(prompt) - 1 : -1], 3)
        check(answer.prompt, prompt[1:] if index == 0 else [], expected[: len(prompt) - 1 if index == 0 else 0], 1)
    runner.close()


def test_they_are_of_the_logits_before_tokens_are_ruled_out(folder, log_softmax, random_prompts, monkeypatch):
    runner = start(folder, "native", monkeypatch)
    core = build_core(runner.resolved, runner, "test")
    (prompt,) = random_prompts((20,))
    best = int(log_softmax(prompt)[-1].argmax())
    one = request(1, prompt, temperature=0.0, min_tokens=1, stop_token_ids=(best,), ignore_eos=False, logprobs=1)
    answer = run(core, [one])[1, 0]
    assert answer.tokens[0] != best
    assert answer.logprobs[0].top[0][0] == best and answer.logprobs[0].rank > 1
    check(answer.logprobs[:1], answer.tokens[:1], log_softmax(prompt)[-1:], 1)
    runner.close()


def test_a_step_scores_a_bounded_number_of_tokens_and_others_go_on(folder, random_prompts, monkeypatch):
    runner = start(folder, "native", monkeypatch, max_num_batched_tokens=200)
    plans, submit = [], runner.submit
    monkeypatch.setattr(runner, "submit", lambda plan: plans.append(plan) or submit(plan))
    core = build_core(runner.resolved, runner, "test")
    prompts = random_prompts((150, 140, 130))
    answers = run(core, [request(i, prompt, prompt_logprobs=0 if i < 2 else None) for i, prompt in enumerate(prompts)])
    assert [len(answers[i, 0].prompt) for i in range(3)] == [149, 139, 0]
    assert max(plan.num_scored for plan in plans) == MAX_SCORED_TOKENS
    assert all(plan.num_scored == sum(len(row.scored) for row in plan.rows) for plan in plans)
    assert {row.num_tokens for row in plans[0].rows if row.request_id == 2} == {130}
    runner.close()


def test_who_asks_for_none_pays_nothing(folder, random_prompts, monkeypatch):
    runner = start(folder, "torch", monkeypatch)
    monkeypatch.setattr(Ops, "log_probabilities", None)
    core = build_core(runner.resolved, runner, "test")
    answers = run(core, [request(i, prompt) for i, prompt in enumerate(random_prompts(LENGTHS))])
    assert all(len(answer.tokens) == NUM_TOKENS for answer in answers.values())
    runner.close()


@pytest.mark.parametrize("device", ["native", "late"])
def test_a_prompt_that_is_preempted_half_way_is_scored_once(device, folder, log_softmax, random_prompts, monkeypatch):
    """The first one's 33rd token needs a block when the second, of 10 of the 12, is in the middle of its prompt."""
    settings = {"num_gpu_blocks_override": 12, "max_model_len": 192, "watermark": 0.0, "enable_prefix_caching": False}
    runner = start(folder, device, monkeypatch, **settings)
    core = build_core(runner.resolved, runner, "test")
    first, second = random_prompts((31, 150))
    core.handle(request(1, first))
    core.step()
    answer = run(core, [request(2, second, prompt_logprobs=2)])[2, 0]
    assert core.scheduler.stats().preemptions == 1
    check(answer.prompt, second[1:], log_softmax(second)[:-1], 2)
    runner.close()
