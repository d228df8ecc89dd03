"""What the user sees: lines, and in a terminal one changing line while something is awaited."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from flashserve.launcher import log_lines

QUIET_INTERVAL_S = 5.0
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Console:
    """Writes lines to stderr; thread-safe."""

    def __init__(self, stream: TextIO | None = None, as_json: bool = False) -> None:
        """``as_json``: a JSON object in each line, for machines that collect logs."""
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._json = as_json
        self._live = self._stream.isatty() and not as_json
        self._shown = ""
        self._last_progress = time.monotonic()
        self._ticks = 0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._line(log_lines.said(line.strip()) if self._json else line)

    def show_log(self, line: str) -> None:
        """A line of tritonserver's log, which stubs and engines share."""
        self._line(log_lines.as_json(line) if self._json else line)

    def fail(self, message: str, advice: str = "") -> None:
        """An error and what to do about it."""
        if self._json:
            self._line(log_lines.said(f"{message}; {advice}" if advice else message, "error"))
            return
        self.say(f"flashserve: error: {message}")
        if advice:
            self.say(f"  → {advice}")

    def _line(self, text: str) -> None:
        with self._lock:
            self._erase()
            self._write(text + "\n")

    def progress(self, text: str) -> None:
        """The state of a wait. Without a terminal a line every five seconds, so that logs stay short."""
        with self._lock:
            if self._live:
                self._ticks += 1
                self._erase()
                self._shown = f"{SPINNER[self._ticks % len(SPINNER)]} {text}"[:118]
                self._write(self._shown)
            elif time.monotonic() - self._last_progress >= QUIET_INTERVAL_S:
                self._last_progress = time.monotonic()
                self._write((log_lines.said(text.strip()) if self._json else text) + "\n")

    def done(self) -> None:
        """Remove the progress line."""
        with self._lock:
            self._erase()

    def _erase(self) -> None:
        if self._shown:
            self._shown = ""
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone; the server is not
            self._live = False
