"""What somebody sees while a large model loads."""

from __future__ import annotations

import io

from flashserve.models import progress
from flashserve.models.progress import LoadingProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_the_log_stays_empty(monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    caplog.set_level("INFO")
    bar = LoadingProgress(4_000_000_000)
    bar._bar.mininterval = 0
    bar.advance(1_000_000_000)
    bar.close()
    assert "loading weights:  25%" in terminal.getvalue() and "4.00G" in terminal.getvalue()
    assert not caplog.records


def test_a_log_gets_a_line_now_and_then(monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level("INFO")
    loading = LoadingProgress(2_000_000_000)
    for _ in range(8):
        clock[0] += 1.0
        loading.advance(250_000_000)
    loading.close()
    assert [record.getMessage() for record in caplog.records] == [
        "loading weights: 37% of 2.0 GB",
        "loading weights: 75% of 2.0 GB",
    ]
