"""Sampling in C++ on every instruction set: the reference's tokens, with the reference's noise."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels import sampling as reference
from flashserve_kernels.cpu.program import Program
from flashserve_kernels.cpu.sampling import (
    apply_penalties_,
    count_tokens_,
    greedy,
    log_probabilities,
    sample,
    sample_rows,
)
from flashserve_kernels.recording import LOGITS
from flashserve_kernels.sampling import Stage

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 24
# temperature, min_p, top_k, top_p
SETTINGS = {
    "temperature": (0.7, 0.0, 0, 1.0),
    "min-p": (1.0, 0.1, 0, 1.0),
    "top-k": (1.0, 0.0, 50, 1.0),
    "top-k of one": (1.5, 0.0, 1, 1.0),
    "top-k beyond the blocks": (1.0, 0.0, 700, 1.0),
    "top-k of more than all": (1.0, 0.0, 1 << 40, 1.0),
    "top-p": (1.0, 0.0, 0, 0.9),
    "top-p close to 1": (2.0, 0.0, 0, 0.999),
    "small top-p": (1.0, 0.0, 0, 1e-6),
    "all": (1.3, 0.02, 40, 0.8),
}


def arguments(settings, rows=ROWS):
    temperature, min_p, top_k, top_p = settings
    return [
        torch.full((rows,), temperature),
        torch.full((rows,), min_p),
        torch.full((rows,), top_k, dtype=torch.int64),
        torch.full((rows,), top_p),
        torch.arange(rows) * 7919 - 5,  # some seeds are negative
        torch.arange(rows) * 31,
    ]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("vocab", [7, 1000, 32003])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_references_tokens(pool, settings, vocab, spread):
    logits = torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    numbers = arguments(settings)
    assert torch.equal(sample(pool, logits, *numbers), reference.sample(logits, *numbers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [SETTINGS["temperature"], SETTINGS["all"]], ids=["temperature", "all"])
def test_equal_logits_stay_together(pool, dtype, settings):
    """16-bit and repeated logits: many are equal to the last that is kept."""
    logits = torch.randn(ROWS, 2000).mul_(2).round_().to(dtype)
    numbers = arguments(settings)
    assert torch.equal(sample(pool, logits, *numbers), reference.sample(logits, *numbers))


def test_noise_has_the_references_bits(pool):
    """Equal logits: the token with the most noise wins, of half a million tokens for each (seed, position)."""
    logits = torch.zeros(8, 65_000)
    numbers = arguments((1.0, 0.0, 0, 1.0), rows=8)
    numbers[4] = torch.tensor([0, -1, 1 << 40, -(1 << 63), (1 << 63) - 1, 3, 4, 5])
    assert torch.equal(sample(pool, logits, *numbers), reference.sample(logits, *numbers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 64, 4099])
def test_greedy_takes_the_first_of_equals(pool, dtype, vocab):
    wide = torch.randn(40, vocab + 3).mul_(2).round_().to(dtype)
    logits = wide[:, :vocab]
    expected = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    assert torch.equal(greedy(pool, logits), expected)
    cold = arguments((0.0, 0.5, 3, 0.5), rows=40)
    assert torch.equal(sample(pool, logits, *cold), expected)


def test_masked_tokens_are_never_drawn(pool):
    logits = torch.full((ROWS, 500), float("-inf"))
    logits[:, 321] = -3.0
    for settings in SETTINGS.values():
        assert (sample(pool, logits, *arguments(settings)) == 321).all()
    assert (greedy(pool, logits) == 321).all()


def test_rows_do_not_depend_on_each_other(pool):
    logits = torch.randn(len(SETTINGS) + 1, 3000)
    rows = [arguments(settings, rows=1) for settings in (*SETTINGS.values(), (0.0, 0.0, 0, 1.0))]
    together = [torch.cat(column) for column in zip(*rows, strict=True)]
    alone = torch.cat([sample(pool, logits[row : row + 1], *numbers) for row, numbers in enumerate(rows)])
    assert torch.equal(sample(pool, logits, *together), alone)


@pytest.mark.parametrize(
    "stages", [Stage(0), Stage.RANDOM, Stage.RANDOM | Stage.TOP_K, Stage.RANDOM | Stage.MIN_P | Stage.TOP_P, ~Stage(0)]
)
def test_only_the_stages_that_a_step_needs(pool, stages):
    """By slot, from a table of records; columns of other stages hold what would change every token."""
    table = torch.zeros(7, 5)
    table[:, 0] = torch.tensor([0.8, 0.0, 1.5, 0.7, 0.0, 1.0, 2.0])
    columns = {
        "temperature": table[:, 0],
        "min_p": table[:, 1].fill_(0.1 if Stage.MIN_P in stages else 1.0),
        "top_k": torch.full((7, 2), 9 if Stage.TOP_K in stages else 1)[:, 1],
        "top_p": table[:, 3].fill_(0.9 if Stage.TOP_P in stages else 1e-6),
        "seed": torch.arange(7) * 31,
    }
    logits, slots = torch.randn(12, 900) * 2, torch.tensor([6, 5, 4, 3, 2, 1, 0, 0, 2, 3, 5, 6])
    positions = torch.arange(12)
    tokens = sample_rows(pool, logits, slots, positions, stages, **columns)
    assert torch.equal(tokens, reference.sample_rows(logits, slots, positions, stages, **columns))
    is_best = tokens == logits.argmax(-1)
    assert is_best[[2, 5]].all() and bool(is_best.all()) == (not stages)


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties(pool, dtype):
    logits = torch.randn(5, 300).to(dtype)
    slots = torch.tensor([2, -1, 0, 1, 2])
    counts = torch.randint(0, 3, (3, 300), dtype=torch.int32)
    in_prompt = torch.rand(3, 300) < 0.3
    repetition = torch.tensor([1.3, 2.0, 1.0, 0.8, 1.0])
    presence, frequency = torch.tensor([0.5, 1.0, 0.0, -0.5, 0.0]), torch.tensor([0.1, 1.0, 0.0, 0.7, 0.0])
    x, count = logits.double(), counts[slots].double()
    factor = repetition.double()[:, None]
    x = torch.where((count > 0) | in_prompt[slots], torch.where(x > 0, x / factor, x * factor), x)
    x = x - frequency.double()[:, None] * count - presence.double()[:, None] * (count > 0)
    x[1] = logits[1].double()
    assert apply_penalties_(pool, logits, slots, counts, in_prompt, repetition, presence, frequency) is logits
    torch.testing.assert_close(logits.double(), x, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_token_counts(pool):
    counts = torch.zeros(3, 50, dtype=torch.int32)
    slots, tokens = torch.tensor([0, 2, -1, 2, 2]), torch.tensor([7, 49, 3, 49, 0])
    assert count_tokens_(pool, counts, slots, tokens) is counts
    assert {tuple(at): int(counts[tuple(at)]) for at in counts.nonzero().tolist()} == {
        (0, 7): 1, (2, 0): 1, (2, 49): 2,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, num_top", [(20, 20), (1000, 0), (1000, 5), (5000, 20)])
def test_log_probabilities(pool, dtype, vocab, num_top):
    torch.manual_seed(vocab)
    logits = torch.randn(9, vocab).mul_(3).to(dtype)
    logits[:, vocab // 2] = logits[:, 0]  # equal ones
    tokens = torch.randint(vocab, (9,))
    chosen, rank, top, top_tokens = log_probabilities(pool, logits, tokens, num_top)
    every = logits.double().log_softmax(-1)
    own = every.gather(1, tokens[:, None])
    order = logits.float().sort(dim=-1, descending=True, stable=True)
    # The logarithm of the sum lies between 8 and 16, where float32's steps are 1e-6; it is rounded, and subtracted.
    torch.testing.assert_close(chosen.double(), own[:, 0], rtol=1e-6, atol=3e-6)
    assert torch.equal(rank, (logits > logits.gather(1, tokens[:, None])).sum(-1) + 1)
    assert torch.equal(top_tokens, order.indices[:, :num_top])
    torch.testing.assert_close(top.double(), every.gather(1, top_tokens), rtol=1e-6, atol=3e-6)


def test_a_recorded_program_serves_every_number_of_rows(pool):
    logits, numbers = torch.randn(ROWS, 700), arguments(SETTINGS["all"])
    program = Program(pool, (1, 1, ROWS))
    for tensor in (logits, *numbers):
        program.add_input(tensor, LOGITS)
    with program.recording():
        tokens = sample(pool, logits, *numbers)
    for rows in (ROWS, 1, 11):
        tokens.fill_(-1)
        logits.normal_()
        program.run(0, 0, rows)
        assert torch.equal(tokens[:rows], sample(pool, logits[:rows], *(x[:rows] for x in numbers)))
        assert (tokens[rows:] == -1).all()


def test_wrong_arguments_are_refused(pool):
    logits, numbers = torch.zeros(2, 4), arguments((1.0, 0.0, 0, 1.0), rows=2)
    numbers[2] = numbers[2].int()
    with pytest.raises(ValueError, match="int64"):
        sample(pool, logits, *numbers)
    with pytest.raises(ValueError, match="num_top"):
        log_probabilities(pool, logits, torch.zeros(2, dtype=torch.int64), 5)
