"""What can go wrong before a server serves."""

from __future__ import annotations


class LauncherError(Exception):
    """Starting failed; ``str(error)`` says what, ``advice`` what to do about it."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice
