"""`frontend/senders.py`: order within a key, no waiting between keys, an end with a bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from flashserve.frontend import senders
from flashserve.frontend.senders import NUM_THREADS, Senders


@pytest.fixture
def running() -> Iterator[Senders]:
    made = Senders()
    made.start()
    yield made
    made.stop()
    assert not made.alive


def test_jobs_of_a_key_run_in_their_order_on_one_thread(running: Senders) -> None:
    seen: dict[int, list[tuple[int, int]]] = {key: [] for key in range(10)}
    for number in range(200):
        for key in seen:
            running.put(key, lambda key=key, number=number: seen[key].append((number, threading.get_ident())))
    running.stop()
    for jobs in seen.values():
        assert [number for number, _ in jobs] == list(range(200))
        assert len({thread for _, thread in jobs}) == 1
    assert len({jobs[0][1] for jobs in seen.values()}) == NUM_THREADS


def test_a_job_that_blocks_holds_up_its_own_thread_alone(running: Senders) -> None:
    go_on, others = threading.Event(), threading.Barrier(NUM_THREADS)
    running.put(0, lambda: go_on.wait(10))
    for key in range(1, NUM_THREADS):
        running.put(key, lambda: others.wait(5))
    others.wait(5)  # BrokenBarrierError if one of them had not come
    go_on.set()


def test_a_job_that_fails_is_logged_and_the_next_one_runs(running: Senders, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    running.put(0, lambda: 1 / 0)
    running.put(0, done.set)
    assert done.wait(5)
    assert "a response could not be sent" in caplog.text


def test_the_end_comes_after_what_is_queued_but_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "STOP_TIMEOUT_S", 0.2)
    made, hang, did = Senders(), threading.Event(), threading.Event()
    made.start()
    made.put(0, lambda: hang.wait(10))
    made.put(1, did.set)
    start = time.monotonic()
    made.stop()
    assert did.is_set()
    assert 0.15 < time.monotonic() - start < 2
    hang.set()
