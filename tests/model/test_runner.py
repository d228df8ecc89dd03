"""The runner's side of the seam to the engine."""

from __future__ import annotations

import pytest

from flashserve.protocol import SamplingParams
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput

GREEDY = SamplingParams(temperature=0)


def test_samples_come_in_the_plans_order_and_only_for_rows_that_sample(folder, drive, greedy_reference, random_prompts):
    """Rows are reordered inside; a long chunk that does not sample stands between short ones that do."""
    prompts = random_prompts((30, 50, 1, 4))
    expected = [tokens[0] for tokens in greedy_reference(folder, prompts, 1)]
    admissions = [Admission(i, 7 - i, GREEDY, 0, len(prompt), ()) for i, prompt in enumerate(prompts)]
    rows = [
        ScheduledRow(0, 7, 0, 30, prompts[0], [10, 11], 1),
        ScheduledRow(1, 6, 0, 40, prompts[1][:40], [1, 2, 3, 4], 0),
        ScheduledRow(2, 5, 0, 1, prompts[2], [20], 1),
        ScheduledRow(3, 4, 0, 4, prompts[3], [30], 1),
    ]
    driver = drive(folder)
    assert driver.run(admissions, rows) == [[expected[0]], [], [expected[2]], [expected[3]]]
    # The chunk's rest, a single known token at its end, beside a row that reads its own last sample.
    rest = ScheduledRow(1, 6, 40, 9, prompts[1][40:49], [], 0)
    assert driver.run([], [rest]) == [[]]
    last = ScheduledRow(1, 6, 49, 1, prompts[1][49:], [], 1)
    decode = ScheduledRow(2, 5, 1, 1, [], [], 1)
    second = greedy_reference(folder, [prompts[2]], 2)[0][1]
    assert driver.run([], [decode, last]) == [[second], [expected[1]]]


def test_a_step_without_any_sample(folder, drive, random_prompts):
    prompt = random_prompts([64])[0]
    row = ScheduledRow(0, 0, 0, 64, prompt, [3, 2, 1, 0], 0)
    assert drive(folder).run([Admission(0, 0, GREEDY, 0, 100, ())], [row]) == [[]]


def test_close_can_be_called_twice_and_ends_submit(folder, drive):
    runner = drive(folder).runner
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(SchedulerOutput(0, [], [], 0, []))
