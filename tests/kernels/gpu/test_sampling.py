"""Sampling without a sort: the reference's bits, its truncation, its tokens, and the right distribution."""

from __future__ import annotations

import math

import pytest
import torch

from flashserve_kernels import noise as reference_noise
from flashserve_kernels import penalties as reference_penalties
from flashserve_kernels import sampling as reference
from flashserve_kernels.gpu import logprobs, noise, penalties, sampling
from flashserve_kernels.logprobs import log_probabilities

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_logits(rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)


def full(rows: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows,), value, dtype=dtype)


def kept_by_definition(
    logits: torch.Tensor, temperature: float, min_p: float, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of one row stay, and which are too close to a bound to tell; in float64, by sorting."""
    scores = (logits.float() / temperature).double()
    floor = scores.max() + (math.log(min_p) if min_p > 0 else -math.inf)
    kept, unsure = scores >= floor, (scores - floor).abs() < 1e-5
    if min_p == 1.0:
        unsure = torch.zeros_like(kept)
    if 0 < top_k < len(scores):
        kept = kept & (scores >= scores.sort(descending=True).values[top_k - 1])
    if top_p < 1:
        probabilities = scores.masked_fill(~kept, -math.inf).softmax(-1)
        above = (probabilities[:, None] * (scores[:, None] > scores[None, :])).sum(0)  # of the tokens above each
        unsure = unsure | (kept & ((above - top_p).abs() < 1e-5))
        kept = kept & (above < top_p)
    return kept, unsure


def test_noise_bits_are_the_references(device):
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(1 << 63), (1 << 63) - 1, (5,), generator=generator)
    seeds[0], seeds[1] = 0, -1
    positions = torch.tensor([0, 5, 8191, 1 << 31, (1 << 40) + 3])
    tokens = torch.cat((torch.arange(2000), torch.tensor([151_935, (1 << 31) - 1]))).to(torch.int32)
    expected = reference_noise.random_bits(seeds, positions, tokens)
    actual = noise.random_bits(seeds.to(device), positions.to(device), tokens.to(device))
    assert torch.equal(actual.cpu(), expected)


def test_gumbel_noise_is_the_references_up_to_the_logarithm(device):
    seeds, positions = torch.arange(20), torch.arange(20) * 7
    tokens = torch.arange(5000, dtype=torch.int32)
    expected = reference_noise.gumbel_noise(seeds, positions, tokens).double()
    actual = noise.gumbel_noise(seeds.to(device), positions.to(device), tokens.to(device)).cpu().double()
    assert (actual - expected).abs().max() < 4e-6 * 4
    assert expected.max() > 9  # the rare large values, which win, are among them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab", [(1, 1), (1, 50), (3, 4096), (2, 5001), (400, 300), (1, 49_152)])
def test_greedy_takes_the_first_of_the_highest(dtype, rows, vocab, device):
    logits = random_logits(rows, vocab, dtype)
    logits[0, vocab // 2 :] = logits.max()  # many ties
    assert torch.equal(sampling.greedy(logits.to(device)).cpu(), logits.float().argmax(-1))


def test_greedy_survives_rows_without_a_number(device):
    """What a padding row computed must not read or write out of bounds."""
    logits = random_logits(4, 5000, torch.float32)
    logits[1], logits[2] = -math.inf, math.nan
    tokens = sampling.greedy(logits.to(device)).cpu()
    assert tokens[[0, 3]].tolist() == logits[[0, 3]].argmax(-1).tolist()
    assert bool(((tokens >= 0) & (tokens < 5000)).all())


def test_rows_of_a_wider_matrix(device):
    logits = random_logits(6, 700, torch.bfloat16).to(device)
    assert torch.equal(sampling.greedy(logits[:, :500]), sampling.greedy(logits[:, :500].contiguous()))


TRUNCATIONS = [
    (0.0, 1, 1.0), (0.0, 5, 1.0), (0.0, 50, 1.0), (0.0, 599, 1.0), (0.0, 600, 1.0), (0.0, 10_000, 1.0),
    (0.0, 0, 0.05), (0.0, 0, 0.9), (0.0, 0, 0.999), (0.0, 0, 1e-6), (0.05, 0, 1.0), (1.0, 0, 1.0),
    (0.02, 40, 0.9), (0.3, 3, 0.5), (0.0, 20, 0.95), (0.0, 3, 0.99999994), (1.0, 5, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("dtype, temperature, scale", [
    (torch.float32, 0.7, 3.0), (torch.bfloat16, 0.7, 3.0), (torch.float16, 1.7, 30.0), (torch.float32, 1.0, 0.01),
])  # fmt: skip
def test_truncation_keeps_what_the_definition_keeps(dtype, temperature, scale, device):
    logits = random_logits(len(TRUNCATIONS), 600, dtype, scale, seed=2)
    min_p, top_k, top_p = (torch.tensor(column) for column in zip(*TRUNCATIONS, strict=True))
    temperatures = full(len(TRUNCATIONS), temperature)
    threshold = sampling.thresholds(
        logits.to(device), temperatures.to(device), min_p.to(device), top_k.to(device), top_p.to(device)
    ).cpu()
    kept = logits.float() / temperature >= threshold[:, None]
    for row, settings in enumerate(TRUNCATIONS):
        expected, unsure = kept_by_definition(logits[row], temperature, *settings)
        assert torch.equal(kept[row] | unsure, expected | unsure), settings
        assert int(unsure.sum()) <= max(2, int(expected.sum()) // 4) or scale < 1, settings


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_with_the_last_kept_token_stay(dtype, device):
    """As many tokens as share the k-th logit, or the logit at which top-p is reached."""
    logits = torch.full((3, 100), -5.0)
    logits[:, 3], logits[:, 10:20] = 2.0, 1.0
    top_k, top_p = torch.tensor([2, 0, 0]), torch.tensor([1.0, 0.5, 0.2])
    threshold = sampling.thresholds(
        logits.to(dtype).to(device),
        full(3, 1.0).to(device),
        full(3, 0.0).to(device),
        top_k.to(device),
        top_p.to(device),
    ).cpu()
    assert (logits >= threshold[:, None]).sum(-1).tolist() == [11, 11, 1]


def test_truncation_of_masked_logits(device):
    """Tokens at -inf or at the lowest float are ruled out by someone else, and cost no long search."""
    logits = random_logits(4, 1000, torch.float32)
    logits[0, 5:], logits[1, 5:], logits[2, 5:] = -math.inf, torch.finfo(torch.float32).min, -math.inf
    logits[3, 0] = 1e30
    top_k, top_p = torch.tensor([50, 3, 0, 20]), torch.tensor([1.0, 1.0, 0.9, 1.0])
    threshold = sampling.thresholds(
        logits.to(device), full(4, 1.0).to(device), full(4, 0.0).to(device), top_k.to(device), top_p.to(device)
    ).cpu()
    kept = (logits >= threshold[:, None]) & (logits > -math.inf)
    expected = kept_by_definition(logits[2], 1.0, 0.0, 0, 0.9)[0].sum()
    assert kept.sum(-1).tolist() == [5, 3, int(expected), 20]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [97, 9000])
def test_tokens_are_the_references(dtype, vocab, device):
    """Greedy rows beside sampled ones, each with parameters of its own."""
    rows = 24
    logits = random_logits(rows, vocab, dtype, seed=4)
    generator = torch.Generator().manual_seed(5)
    temperature = torch.rand(rows, generator=generator) + 0.5
    temperature[::4] = 0
    min_p = torch.rand(rows, generator=generator) * 0.1 * (torch.arange(rows) % 3 == 0)
    top_k = torch.randint(0, 60, (rows,), generator=generator) * (torch.arange(rows) % 2)
    top_p = torch.where(torch.arange(rows) % 5 < 2, 0.5 + 0.5 * torch.rand(rows, generator=generator), 1.0)
    seeds, positions = torch.arange(rows) * 977, torch.arange(rows) + 3
    sampled = (temperature > 0).nonzero()[:, 0]
    expected = reference.greedy(logits)
    expected[sampled] = reference.sample(
        *(x[sampled] for x in (logits, temperature, min_p, top_k, top_p, seeds, positions))
    )
    before = logits.clone()
    arguments = [x.to(device) for x in (logits, temperature, min_p, top_k, top_p, seeds, positions)]
    assert torch.equal(sampling.sample(*arguments).cpu(), expected)
    assert torch.equal(logits, before)
    assert len(expected.unique()) > rows // 3


def test_parameters_that_no_row_uses_may_be_left_out(device):
    rows = 6
    logits = random_logits(rows, 300, torch.float32).to(device)
    temperature, ids = full(rows, 1.0).to(device), torch.arange(rows, device=device)
    off = full(rows, 0.0).to(device), full(rows, 0, torch.int64).to(device), full(rows, 1.0).to(device)
    expected = sampling.sample(logits, temperature, *off, ids, ids)
    assert torch.equal(sampling.sample(logits, temperature, None, None, None, ids, ids), expected)
    assert torch.equal(sampling.sample(logits, temperature, None, off[1], None, ids, ids), expected)


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 1.0, 0.0), (8, 0.9, 0.02)])
def test_samples_follow_the_softmax(top_k, top_p, min_p, device):
    """Chi-square over the positions of one seed; the bounds have p = 0.001 for 30 and for 4 degrees of freedom."""
    count, temperature = 1000, 1.3
    logits = random_logits(1, 31, torch.float32, 1.5, seed=6)
    kept, _ = kept_by_definition(logits[0], temperature, min_p, top_k, top_p)
    probabilities = (logits[0] / temperature).masked_fill(~kept, -math.inf).double().softmax(-1)
    one = [x.to(device) for x in (full(1, temperature), full(1, min_p), full(1, top_k, torch.int64), full(1, top_p))]
    threshold = sampling.thresholds(logits.to(device), *one)
    rows, positions = logits.to(device).expand(count, -1), torch.arange(count, device=device)
    # The threshold once and not for every row: the interpreter takes 50 ms for it.
    tokens = sampling._argmax(
        rows, one[0].expand(count).contiguous(), threshold.expand(count).contiguous(), positions * 0 + 11, positions
    ).cpu()

    def chi_square(probabilities: torch.Tensor) -> float:
        """Over the possible tokens, divided by the degrees of freedom."""
        expected = probabilities[kept] * count
        found = torch.bincount(tokens, minlength=31)[kept].double()
        return float(((found - expected).pow(2) / expected).sum() / (int(kept.sum()) - 1))

    assert bool(kept[tokens].all())
    assert int(kept.sum()) >= 5
    bound = 1.99 if top_k == 0 else 4.6
    assert chi_square(probabilities) < bound
    assert chi_square((logits[0] / (temperature * 2)).masked_fill(~kept, -math.inf).double().softmax(-1)) > bound


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("vocab", [1, 4096, 4097, 49_152, 151_936])
def test_slices_cover_the_vocabulary(num_rows, vocab):
    count, size = sampling.slices(num_rows, vocab, num_sms=132)
    assert (count - 1) * size < vocab <= count * size
    assert count * num_rows <= 2 * 132 + num_rows or count == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab, num_top", [(1, 20, 20), (3, 5000, 0), (4, 5000, 5), (2, 12_300, 20)])
def test_logprobs(dtype, rows, vocab, num_top, device):
    logits = random_logits(rows, vocab, dtype, seed=7)
    logits[0, vocab // 2 :] = logits[0].max()  # ties
    tokens = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(8))
    exact = logits.double().log_softmax(-1)
    expected = log_probabilities(logits, tokens, num_top)
    actual = [x.cpu() for x in logprobs.log_probabilities(logits.to(device), tokens.to(device), num_top)]
    assert torch.equal(actual[1], expected.rank) and torch.equal(actual[3], expected.top_tokens)
    chosen = exact.gather(1, tokens[:, None])[:, 0]
    torch_error = (logits.float().log_softmax(-1) - exact).abs().max()
    assert (actual[0] - chosen).abs().max() <= 2 * torch_error + 1e-7
    assert bool(((actual[2] - exact.gather(1, expected.top_tokens)).abs() <= 2 * torch_error + 1e-6).all())


def test_logprobs_where_fewer_tokens_are_possible_than_asked_for(device):
    logits = torch.full((1, 4200), -math.inf)
    logits[0, [4, 4100]] = torch.tensor([1.0, 2.0])
    found = logprobs.log_probabilities(logits.to(device), torch.tensor([4], device=device), 5)
    assert found.top_tokens.tolist() == [[4100, 4, 0, 1, 2]]
    assert found.rank.tolist() == [2]
    assert found.top[0, 2:].tolist() == [-math.inf] * 3
    with pytest.raises(ValueError, match="0 to 20, not 21"):
        logprobs.log_probabilities(logits, torch.tensor([4]), 21)


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties(dtype, device):
    """Rows without penalties, with each, with all, and of no slot."""
    rows, vocab, num_slots = 6, 3000, 9
    generator = torch.Generator().manual_seed(9)
    logits = random_logits(rows, vocab, dtype, seed=9)
    counts = torch.randint(-6, 4, (num_slots, vocab), generator=generator).clamp(min=0).to(torch.int32)
    in_prompt = torch.rand(num_slots, vocab, generator=generator) < 0.2
    slots = torch.tensor([3, 0, 8, 5, -1, 3])
    repetition = torch.tensor([1.0, 1.3, 1.0, 1.0, 1.5, 0.8])
    presence = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.5, -0.4])
    frequency = torch.tensor([0.0, 0.0, 0.0, 0.7, 0.7, 0.3])
    arguments = slots, counts, in_prompt, repetition, presence, frequency
    expected = reference_penalties.apply_penalties_(logits.clone(), *arguments)
    actual = penalties.apply_penalties_(logits.clone().to(device), *(x.to(device) for x in arguments)).cpu()
    torch.testing.assert_close(actual, expected, rtol=2e-7 if dtype == torch.float32 else 0, atol=1e-7)
    assert torch.equal(actual[[0, 4]], logits[[0, 4]])
    # One token of each kind by hand: row 5 of slot 3.
    token = int(((counts[3] == 2) & (logits[5] > 0)).nonzero()[0])
    by_hand = float(logits[5, token]) / 0.8 - 0.3 * 2 + 0.4
    assert float(actual[5, token]) == pytest.approx(by_hand, rel=1e-2 if dtype != torch.float32 else 1e-6)
    token = int(((counts[0] == 0) & in_prompt[0] & (logits[1] < 0)).nonzero()[0])
    assert float(actual[1, token]) == pytest.approx(float(logits[1, token]) * 1.3, rel=1e-2)


def test_tokens_are_counted(device):
    counts = torch.randint(0, 5, (4, 300), generator=torch.Generator().manual_seed(10), dtype=torch.int32)
    slots, tokens = torch.tensor([2, -1, 0, 2, 2] * 40), torch.tensor([7, 7, 299, 7, 8] * 40)
    expected = reference_penalties.count_tokens_(counts.clone(), slots, tokens)
    assert int((expected - counts).sum()) == 160 and int(expected[2, 7] - counts[2, 7]) == 80
    actual = penalties.count_tokens_(counts.clone().to(device), slots.to(device), tokens.to(device))
    assert torch.equal(actual.cpu(), expected)
