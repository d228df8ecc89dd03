"""Prompts beside decodes: how much of them a step takes."""

from __future__ import annotations

import pytest

from flashserve.engine.pacing import MIN_TOKENS, STRETCH, PrefillPacing
from flashserve.scheduling.output import ScheduledRow, SchedulerOutput


def step(decodes: int, prompt_tokens: int) -> SchedulerOutput:
    rows = [ScheduledRow(i, i, 100, 1, [], [], 1) for i in range(decodes)]
    if prompt_tokens:
        rows.append(ScheduledRow(99, 99, 0, prompt_tokens, [1] * prompt_tokens, [], 1))
    return SchedulerOutput(1, [], rows, decodes + prompt_tokens, [])


def device(decode_s: float, token_s: float, decodes: int, prompt_tokens: int) -> float:
    return (decode_s if decodes else 0) + token_s * prompt_tokens


def test_the_budget_holds_until_both_times_are_known():
    pacing = PrefillPacing(4096)
    assert pacing.limit() == 4096
    pacing.observe(step(0, 512), 0.1)
    assert pacing.limit() == 4096
    pacing.observe(step(4, 0), 0.02)
    assert pacing.limit() < 4096


@pytest.mark.parametrize("decode_s, token_s", [(0.020, 0.000166), (0.075, 0.0009), (0.030, 0.0001)])
def test_a_mixed_step_is_stretched_as_promised(decode_s, token_s):
    pacing = PrefillPacing(4096)
    for _ in range(30):
        prompt_tokens = pacing.limit()
        for decodes, tokens in ((16, 0), (16, prompt_tokens)):
            pacing.observe(step(decodes, tokens), device(decode_s, token_s, decodes, tokens))
    assert device(decode_s, token_s, 16, pacing.limit()) == pytest.approx(STRETCH * decode_s, rel=0.02)


def test_it_follows_a_device_that_slows_down():
    pacing = PrefillPacing(4096)
    for factor in [1.0] * 20 + [3.0] * 40:
        for decodes, tokens in ((8, 0), (8, max(MIN_TOKENS, pacing.limit()))):
            pacing.observe(step(decodes, tokens), device(0.02, 0.0001 * factor, decodes, tokens))
    assert pacing.limit() == pytest.approx((STRETCH - 1) * 0.02 / 0.0003, rel=0.05)


def test_a_prompt_always_goes_on_and_never_beyond_the_budget():
    slow, fast = PrefillPacing(512), PrefillPacing(512)
    for pacing, token_s in ((slow, 1.0), (fast, 1e-9)):
        pacing.observe(step(1, 0), 0.01)
        pacing.observe(step(1, 100), 0.01 + 100 * token_s)
    assert slow.limit() == MIN_TOKENS
    assert fast.limit() == 512
