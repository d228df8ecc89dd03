"""Sampling through the runner: seeds, mixed batches, minimum lengths."""

from __future__ import annotations

from flashserve.protocol import SamplingParams

LENGTHS = (3, 20, 45, 33, 7, 60)
NUM_TOKENS = 20


def test_a_seeded_request_gives_the_same_text_whatever_shares_its_batch(folder, drive, random_prompts):
    prompts = random_prompts(LENGTHS)
    params = [
        SamplingParams(temperature=0.8, seed=5),
        SamplingParams(temperature=1.2, top_k=40, seed=-(1 << 63)),
        SamplingParams(temperature=1.0, top_p=0.8, seed=(1 << 64) - 1),
        SamplingParams(temperature=1.0, min_p=0.05, seed=3),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.5, top_k=100, top_p=0.9, min_p=0.01, seed=6),
    ]
    driver = drive(folder)
    together = driver.generate(prompts, NUM_TOKENS, params, everyone=True)
    assert driver.generate(prompts, NUM_TOKENS, params, max_chunk=11, seed=3) == together
    for prompt, own, tokens in zip(prompts, params, together, strict=True):
        assert driver.generate([prompt], NUM_TOKENS, [own]) == [tokens]


def test_other_seeds_give_other_texts(folder, drive, random_prompts):
    prompt = random_prompts([10])[0]
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(8)]
    texts = drive(folder).generate([prompt] * 8, NUM_TOKENS, params)
    assert len({tuple(text) for text in texts}) == 8


def test_greedy_rows_are_not_changed_by_sampled_ones(folder, drive, greedy_reference, random_prompts):
    prompts = random_prompts(LENGTHS)
    greedy, sampled = SamplingParams(temperature=0), SamplingParams(temperature=1.0)
    params = [greedy if index % 2 else sampled for index in range(len(prompts))]
    texts = drive(folder).generate(prompts, NUM_TOKENS, params)
    expected = greedy_reference(folder, prompts, NUM_TOKENS)
    assert texts[1::2] == expected[1::2]
    assert all(text != greedy_text for text, greedy_text in zip(texts[::2], expected[::2], strict=True))


def test_tiny_temperatures_and_top_k_1_are_greedy(folder, drive, greedy_reference, random_prompts):
    prompts = random_prompts(LENGTHS[:3])
    params = [
        SamplingParams(temperature=1e-6, seed=1),
        SamplingParams(temperature=1.0, top_k=1, seed=1),
        SamplingParams(temperature=1.0, top_p=1e-9, seed=1),
    ]
    expected = greedy_reference(folder, prompts, NUM_TOKENS)
    assert drive(folder).generate(prompts, NUM_TOKENS, params) == expected


def test_min_tokens_rules_out_every_end_token_for_that_many_samples_only(folder, drive, random_prompts):
    """The greedy text's own tokens are declared end tokens: they must not come early, and may come after."""
    prompts = random_prompts((9, 30))
    driver = drive(folder)
    plain = driver.generate(prompts, NUM_TOKENS)
    ends = tuple(sorted({*plain[0][:5], *plain[1][:5]}))
    params = [SamplingParams(temperature=0, min_tokens=6), SamplingParams(temperature=0)]
    masked, untouched = driver.generate(prompts, NUM_TOKENS, params, max_chunk=8, end_token_ids=ends)
    assert untouched == plain[1]
    assert not set(masked[:6]) & set(ends)
    # From the seventh sample on nothing is masked: the text goes on as that of a prompt with the first six.
    assert masked[6:] == driver.generate([prompts[0] + masked[:6]], NUM_TOKENS - 6)[0]
    sampled = SamplingParams(temperature=5.0, min_tokens=NUM_TOKENS, seed=1)
    assert not set(driver.generate(prompts[:1], NUM_TOKENS, [sampled], end_token_ids=ends)[0]) & set(ends)


def test_recomputation_after_preemption_counts_min_tokens_from_the_prompt(folder, drive, random_prompts):
    """A resumed request is admitted again with the length of its original prompt and all its known tokens."""
    from flashserve.scheduling.output import Admission, ScheduledRow

    prompt = random_prompts([9])[0]
    driver = drive(folder)
    plain = driver.generate([prompt], 10)[0]
    known = prompt + plain[:4]
    params = SamplingParams(temperature=0, min_tokens=5)
    for banned in (plain[4], plain[5]):
        admission = Admission(1, 3, params, 0, len(prompt), (banned,))
        row = ScheduledRow(1, 3, 0, len(known), known, [5, 9], 1)
        fifth = driver.run([admission], [row])[0]
        assert (fifth == [plain[4]]) == (banned != plain[4])
    sixth = driver.run([], [ScheduledRow(1, 3, len(known), 1, plain[4:5], [], 1)])[0]
    assert sixth == [plain[5]]
