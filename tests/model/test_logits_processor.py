"""What requests want of their logits, on the ops of a CPU: the plain reference's numbers, and its frequencies.

Triton-lang's are compared in tests/kernels/gpu/test_logits_processor.py.
"""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch

from flashserve_kernels import Ops
from flashserve_kernels.cpu.library import supported_isas
from flashserve_kernels.cpu.ops import NativeOps
from plain_sampling import (
    CASES,
    EVERYTHING,
    VOCAB,
    Case,
    SamplingParams,
    distribution,
    plain_logits,
    processed,
    sampled,
    without_top_choices,
)


@pytest.fixture(scope="module", params=["torch", *supported_isas()])
def ops(request):
    return Ops(torch.device("cpu")) if request.param == "torch" else NativeOps(request.param, 1)


def random_logits(rows: int, dtype=torch.float32, seed: int = 3) -> torch.Tensor:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def expected(logits: torch.Tensor, cases: list[Case]) -> torch.Tensor:
    rows = []
    for row, asked in zip(logits.tolist(), cases, strict=True):
        x = plain_logits(row, asked)
        strikes = asked.params.xtc_probability == 1 and asked.params.temperature > 0
        rows.append(without_top_choices(x, asked.params) if strikes else x)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_wish_is_the_plain_references_among_all_others(ops, dtype):
    cases = [asked for name, asked in CASES.items() if dtype == torch.float32 or "least" not in name]
    logits = random_logits(len(cases), dtype)
    wanted = expected(logits, cases)
    # A step of 16 bits rounds after each of bias, penalties and DRY.
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    found = processed(ops, logits, cases).double()
    if dtype != torch.float32:  # where the likelihood of a token is close to XTC's threshold, rounding decides
        plain = [row for row, asked in enumerate(cases) if not asked.params.xtc_probability]
        found, wanted = found[plain], wanted[plain]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_change_something_and_each_something_else(name):
    logits = random_logits(1)
    change = expected(logits, [CASES[name]])[0] != logits[0].double()
    neutral = (
        "nothing",
        "a bad word that the prompt begins",
        "dry before a breaker",
        "dry behind a breaker",
        "dry at the first token",
        "xtc without a choice",
        "xtc of a greedy row",
    )
    assert bool(change.any()) == (name not in neutral)


def test_frequencies_are_those_of_the_exact_distribution_with_everything_on(ops):
    """One sample at each of many positions; the bound is that of p = 0.001 at 30 degrees of freedom."""
    asked, count = Case(SamplingParams(**EVERYTHING)), 6000
    logits = random_logits(1, seed=11)[0] / 2

    def chi_square(other: Case) -> float:
        wanted = torch.tensor(distribution(logits.tolist(), other), dtype=torch.float64)
        common = wanted * count >= 5
        seen = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
        pairs = [(seen[common], wanted[common] * count), (seen[~common].sum(), wanted[~common].sum() * count)]
        terms = [((a - b) ** 2 / b).sum() for a, b in pairs if float(torch.as_tensor(b).sum()) > 0]
        return float(sum(terms)) / int(common.sum())

    tokens = sampled(ops, logits, asked, count)
    possible = torch.tensor(distribution(logits.tolist(), asked)) > 0
    assert possible[tokens].all() and not {40, 31} & set(tokens)
    assert 15 <= int(possible.sum()) <= 45
    assert chi_square(asked) < 2
    for name, value in (("presence_penalty", 0.9), ("repetition_penalty", 3.0), ("logit_bias", {30: 4.0, 8: 1.5}),
                        ("dry_multiplier", 0.0), ("xtc_probability", 0.3), ("xtc_threshold", 0.3)):  # fmt: skip
        other = dataclasses.replace(asked, params=msgspec.structs.replace(asked.params, **{name: value}))
        assert chi_square(other) > 2, name


def test_xtc_strikes_a_seeded_text_at_the_same_positions_again(ops):
    asked = Case(SamplingParams(xtc_probability=0.5, xtc_threshold=0.02, temperature=1.0))
    logits = random_logits(1)[0]
    assert sampled(ops, logits, asked, 200) == sampled(ops, logits, asked, 200)
