"""Which tokens wait for the next one."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

from flashserve.frontend.merging import Merging


def request(number: int, sent: int = 1):
    return SimpleNamespace(id=number, completions=[SimpleNamespace(num_delivered=sent)], inbox=deque())


def run_step(merging: Merging, now: float, requests) -> tuple[list[int], list[int]]:
    """(ids that send at once, ids that were overdue) of a step that gives each request a token."""
    merging.start_step(now, len(requests))
    sent = []
    for each in requests:
        each.inbox.append("token")
        if not merging.holds(each):
            sent.append(each.id)
            each.inbox.clear()
    return sent, [late.id for late in merging.overdue()]


def busy(max_tokens: int = 2, count: int = 16) -> tuple[Merging, list, float]:
    merging = Merging()
    merging.max_tokens = max_tokens
    requests = [request(number) for number in range(count)]
    now = 0.0
    for _ in range(40):  # 800 tokens per second
        now += count / 800
        run_step(merging, now, requests)
    return merging, requests, now


def test_a_busy_server_sends_two_tokens_at_once():
    merging, requests, now = busy()
    sent = [len(run_step(merging, now + 0.02 * (i + 1), requests)[0]) for i in range(6)]
    assert sent in ([0, 16] * 3, [16, 0] * 3)


def test_a_calm_server_sends_each_token_alone():
    merging, requests, now = busy(count=2)
    for each in requests:
        each.inbox.clear()
    for i in range(60):
        sent, _ = run_step(merging, now + 0.1 * (i + 1), requests)
    assert sent == [0, 1]


def test_one_token_per_response_can_be_asked_for():
    merging, requests, now = busy(max_tokens=1)
    assert len(run_step(merging, now + 0.02, requests)[0]) == 16


def test_a_first_token_never_waits():
    merging, requests, now = busy()
    assert 99 in run_step(merging, now + 0.02, [*requests, request(99, sent=0)])[0]


def test_a_held_token_leaves_when_the_next_step_brings_none():
    """Its request was preempted, say: the token must not wait until it comes back."""
    merging, requests, now = busy()
    for each in requests:
        each.inbox.clear()
    assert run_step(merging, now + 0.02, requests)[0] == []
    sent, late = run_step(merging, now + 0.04, requests[1:])
    assert len(sent) == 15 and late == [0]
    assert run_step(merging, now + 0.06, requests[1:])[1] == []


def test_nobody_waits_after_a_long_step():
    """It computed a prompt as well: the next one may take as long."""
    merging, requests, now = busy()
    for each in requests:
        each.inbox.clear()
    assert len(run_step(merging, now + 0.07, requests)[0]) == 16
    assert run_step(merging, now + 0.09, requests)[0] == []
