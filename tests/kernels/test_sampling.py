"""Noise that depends on nothing but its counter, samples that follow the distribution, and truncation as in vLLM."""

from __future__ import annotations

import math

import pytest
import torch

from flashserve_kernels.noise import gumbel_noise, random_bits
from flashserve_kernels.sampling import greedy, mask_tokens_, sample


def draw(logits: torch.Tensor, num_samples: int, *, temperature: float = 1.0, min_p: float | None = None,
         top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> torch.Tensor:  # fmt: skip
    """Samples of one distribution at different positions: [num_samples]."""

    def each(value: float | None, dtype: torch.dtype) -> torch.Tensor | None:
        return None if value is None else torch.full((num_samples,), value, dtype=dtype)

    return sample(
        logits.expand(num_samples, -1),
        torch.full((num_samples,), temperature),
        each(min_p, torch.float32),
        each(top_k, torch.int64),
        each(top_p, torch.float32),
        torch.full((num_samples,), seed),
        torch.arange(num_samples),
    )


def chi_square(samples: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The statistic divided by its degrees of freedom; tokens of probability 0 must not occur."""
    counts = torch.bincount(samples, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible].double() * len(samples)
    return float(((counts[possible] - expected).pow(2) / expected).sum() / (int(possible.sum()) - 1))


def vllm_truncation(scores: torch.Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> torch.Tensor:
    """Tokens that stay, as vLLM's PyTorch path decides (v1/sample/ops/topk_topp_sampler.py), for distinct scores."""
    probabilities = scores.softmax(-1)
    if min_p is not None:
        scores = scores.masked_fill(probabilities < min_p * probabilities.max(), -math.inf)
    values, order = scores.sort(descending=False)
    if top_k is not None:
        values = values.masked_fill(values < values[len(values) - top_k], -math.inf)
    if top_p is not None:
        dropped = values.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[-1] = False
        values = values.masked_fill(dropped, -math.inf)
    return torch.empty_like(values).scatter_(0, order, values) > -math.inf


def test_noise_bits_are_the_same_everywhere():
    """Fixed values: another device's implementation must give these bits, and so must every later version."""
    seeds, positions = torch.tensor([0, -1, 1 << 40]), torch.tensor([0, 5, 8191])
    bits = random_bits(seeds, positions, torch.tensor([0, 1, 151_935], dtype=torch.int32))
    assert bits.tolist() == [
        [_reference_bits(seed, position, token) for token in (0, 1, 151_935)]
        for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)
    ]


def _reference_bits(seed: int, position: int, token: int) -> int:
    """The same arithmetic on unbounded integers, cut to the word size after each step."""
    mask64, mask32, golden = (1 << 64) - 1, (1 << 32) - 1, 0x9E3779B97F4A7C15

    def mix64(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask64
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask64
        return x ^ x >> 31

    def mix32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & mask32
        x = (x ^ x >> 15) * 0x846CA68B & mask32
        return x ^ x >> 16

    key = mix64(mix64((seed & mask64) + golden & mask64) ^ (position + 1) * golden & mask64)
    bits = mix32(mix32(token * 0x9E3779B9 & mask32 ^ key & mask32) ^ key >> 32)
    return bits - (1 << 32) if bits >> 31 else bits


def test_noise_does_not_depend_on_the_batch():
    seeds, positions = torch.tensor([7, 8, 9]), torch.tensor([100, 101, 3])
    tokens = torch.arange(1000, dtype=torch.int32)
    together = gumbel_noise(seeds, positions, tokens)
    for row in range(3):
        alone = gumbel_noise(seeds[row : row + 1], positions[row : row + 1], tokens)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(gumbel_noise(seeds, positions, tokens[500:]), together[:, 500:])


def test_noise_follows_the_gumbel_distribution():
    """Kolmogorov-Smirnov over seeds, positions and tokens; the bound is that of p = 0.001."""
    for seeds, positions, tokens in ((1000, 1, 1000), (1, 1000, 1000), (1, 1, 200_000)):
        noise = gumbel_noise(
            torch.arange(seeds).repeat_interleave(positions),
            torch.arange(positions).repeat(seeds),
            torch.arange(tokens, dtype=torch.int32),
        ).flatten()
        ordered = torch.exp(-torch.exp(-noise.double())).sort().values
        steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        assert float((ordered - steps).abs().max()) < 1.95 / math.sqrt(len(ordered))
        assert torch.isfinite(noise).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"position": 1}, {"token": 1}])
def test_neighbouring_counters_are_independent(other):
    """Correlation of the noise of neighbouring seeds, positions and tokens."""
    count = 20_000
    counters = {"seed": torch.zeros(1, dtype=torch.int64), "position": torch.zeros(1, dtype=torch.int64)}
    tokens = torch.arange(count, dtype=torch.int32) * 3
    first = gumbel_noise(counters["seed"], counters["position"], tokens)[0]
    if "token" in other:
        tokens = tokens + 1
    else:
        name = next(iter(other))
        counters[name] = counters[name] + 1
    second = gumbel_noise(counters["seed"], counters["position"], tokens)[0]
    correlation = float(torch.corrcoef(torch.stack((first, second)))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(count)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    samples = draw(logits, 40_000, temperature=temperature)
    # 49 degrees of freedom: 1.75 has p = 0.001.
    assert chi_square(samples, (logits / temperature).softmax(-1)) < 1.75
    assert chi_square(samples, (logits / (temperature * 1.1)).softmax(-1)) > 1.75


@pytest.mark.parametrize("top_k, top_p, min_p", [
    (1, None, None), (5, None, None), (50, None, None), (None, 0.3, None), (None, 0.9, None), (None, 1e-6, None),
    (None, None, 0.05), (None, None, 1.0), (10, 0.7, None), (10, 0.7, 0.1), (3, 0.999, None), (3, 0.99999994, None),
    (None, 0.5, 0.2),
])  # fmt: skip
def test_truncation_is_vllms(top_k, top_p, min_p):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(4)) * 2
    temperature = 1.3
    kept = vllm_truncation(logits / temperature, top_k, top_p, min_p)
    probabilities = (logits / temperature).masked_fill(~kept, -math.inf).softmax(-1)
    samples = draw(logits, 30_000, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if int(kept.sum()) == 1:
        assert samples.unique().tolist() == [int(logits.argmax())]
    else:
        assert chi_square(samples, probabilities) < 4
        likely = (probabilities * 30_000 > 20).nonzero().flatten().tolist()
        assert set(likely) <= set(samples.tolist())


@pytest.mark.parametrize("scale", [0.001, 0.5, 4.0])
@pytest.mark.parametrize("top_p", [0.2, 0.8, 0.99])
def test_top_p_beyond_the_sorted_head(scale, top_p):
    """Flat distributions over a large vocabulary need more tokens than are sorted at first."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(5)) * scale
    kept = vllm_truncation(logits, None, top_p, None)
    samples = draw(logits, 1000, top_p=top_p)
    assert bool(kept[samples].all())
    if scale == 0.001:
        # All are about equally likely, so nearly every kept token must turn up at its rate.
        assert int((~kept).sum()) > 20
        assert len(samples.unique()) > 0.8 * min(1000, int(kept.sum())) * (1 - math.exp(-1))


def test_ties_with_the_kth_token_stay():
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    assert set(draw(logits, 500, top_k=2).tolist()) == {1, 2, 3}


def test_settings_are_per_row():
    """Rows of one batch give what they give alone; 0 and 1 switch a row's truncation off."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(6, 300, generator=generator) * 3
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0, 0.1])
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.3, 0.0])
    top_k = torch.tensor([0, 5, 20, 0, 0, 1])
    top_p = torch.tensor([1.0, 0.9, 1.0, 0.5, 1.0, 1.0])
    seeds = torch.arange(6)
    for position in range(20):
        positions = torch.full((6,), position)
        together = sample(logits, temperature, min_p, top_k, top_p, seeds, positions)
        for row in range(6):
            one = slice(row, row + 1)
            alone = sample(
                logits[one],
                temperature[one],
                min_p[one] if min_p[row] else None,
                top_k[one] if top_k[row] else None,
                top_p[one] if top_p[row] < 1 else None,
                seeds[one],
                positions[one],
            )
            assert alone.tolist() == together[one].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_and_masked_tokens(dtype):
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(7)).to(dtype)
    best = logits.double().argmax(-1)
    assert greedy(logits).tolist() == best.tolist()
    mask_tokens_(logits, torch.tensor([0, 2]), torch.stack((best[0], best[2])))
    after = greedy(logits).tolist()
    assert [a == b for a, b in zip(after, best.tolist(), strict=True)] == [False, True, False, True]


def test_logits_are_left_as_they_are():
    logits = torch.randn(2, 50)
    before = logits.clone()
    zeros = torch.zeros(2, dtype=torch.int64)
    sample(logits, torch.ones(2), torch.full((2,), 0.1), torch.tensor([3, 4]), torch.full((2,), 0.9), zeros, zeros)
    assert torch.equal(logits, before)
