"""The user's arguments for tritonserver: those about loading are the launcher's to combine, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flashserve.launcher.errors import LauncherError

LOAD_MODEL = "--load-model"
CONTROL_MODE = "--model-control-mode"
EXPLICIT = "explicit"
ALL = ("*",)
# Set by the launcher; a second value would take effect without it knowing.
OWN_OPTIONS = (
    "--backend-directory", "--model-repository", "--model-store",
    "--http-port", "--grpc-port", "--metrics-port", "--http-address", "--grpc-address", "--metrics-address",
)  # fmt: skip


@dataclass(frozen=True)
class TritonArguments:
    """What stands behind ``--`` on the launcher's command line."""

    load: tuple[str, ...] = ALL
    """Names of the models to load at the start; ALL: every one; empty: none."""
    says_load: bool = False
    """Whether the arguments say which; else ``load`` is what the launcher takes."""
    others: tuple[str, ...] = ()
    """Passed on as they are."""

    def loading(self, names: Sequence[str]) -> TritonArguments:
        """The same, with other models to load at the start."""
        return replace(self, load=tuple(names))

    @classmethod
    def parse(cls, words: Sequence[str]) -> TritonArguments:
        """Raises LauncherError for an option that is the launcher's own, and for a choice that Triton would refuse."""
        names: list[str] = []
        others: list[str] = []
        is_explicit = False
        remaining = iter(words)
        for word in remaining:
            option, separator, value = word.partition("=")
            if option in OWN_OPTIONS:
                raise LauncherError(f"{option} is set by flashserve", "see: flashserve serve --help")
            if option not in (LOAD_MODEL, CONTROL_MODE):
                others.append(word)
                continue
            if not separator:
                value = next(remaining, "")
            if not value:
                raise LauncherError(f"{option} needs a value", f"{option}=…")
            if option == LOAD_MODEL:
                names.append(value)
            elif value == EXPLICIT:
                is_explicit = True
            else:
                advice = f"to load some models only: flashserve serve -- {LOAD_MODEL}=NAME"
                raise LauncherError(f"{CONTROL_MODE} is set by flashserve to {EXPLICIT}", advice)
        chosen = tuple(dict.fromkeys(names))
        if len(chosen) > 1 and ALL[0] in chosen:
            raise LauncherError(f"{LOAD_MODEL}=* goes with no other {LOAD_MODEL}", "* loads every model")
        # Explicit control without a name loads nothing in Triton, while the launcher alone loads everything.
        return cls(chosen or (() if is_explicit else ALL), is_explicit or bool(chosen), tuple(others))
