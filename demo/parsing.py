"""Whether a completion of a function head is Python.

A completion which the model ended itself is taken whole. One which ran into the limit of tokens ends in
the middle of something: the unfinished logical line at its end is dropped, then block headers which have
lost their body, then a `try` which has lost its handlers. Nothing else is dropped, so that an error
anywhere before the end counts as a failure.
"""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from dataclasses import dataclass


@dataclass
class Verdict:
    """`parsed`: parses, with at least one statement in the body; `has_code`: one is not a docstring."""

    parsed: bool
    has_code: bool
    reason: str


def complete_lines(text: str) -> list[str]:
    """The lines of the text up to the end of its last logical line which a newline ends."""
    lines, last = text.split("\n"), 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE and token.string:
                last = token.end[0]
    except (tokenize.TokenError, SyntaxError):
        pass
    return lines[:last]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _drop_dangling_headers(lines: list[str]) -> list[str]:
    """Drop from the end what cannot stand there: block headers, and comments and decorators below them."""
    while lines and (
        not lines[-1].strip()
        or lines[-1].lstrip().startswith(("#", "@"))
        or lines[-1].split("#")[0].rstrip().endswith(":")
    ):
        lines = lines[:-1]
    return lines


def _drop_open_try(lines: list[str]) -> list[str]:
    """Drop the innermost last `try` block where no handler follows it."""
    margin = _indent(lines[-1]) if lines else 0
    for i in range(len(lines) - 1, 0, -1):
        line = lines[i]
        if not line.strip() or _indent(line) >= margin:
            continue
        margin = _indent(line)
        if line.strip() == "try:":
            return _drop_dangling_headers(lines[:i])
    return lines


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. about escapes in strings: not our question
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def cut(text: str) -> str:
    """Drop the incomplete statement at the end of a text which ran into the limit."""
    lines = _drop_dangling_headers(complete_lines(text))
    while _parse("\n".join(lines)) is None:
        shorter = _drop_open_try(lines)
        if len(shorter) == len(lines):
            break
        lines = shorter
    return "\n".join(lines)


def check(head: str, completion: str, ended: bool) -> Verdict:
    """Judge one completion; `ended` tells whether the model ended it itself."""
    text = head + completion
    if not ended:
        text = cut(text)
    if len(text) <= len(head):
        return Verdict(False, False, "nothing left")
    tree = _parse(text + "\n")
    if tree is None:
        return Verdict(False, False, "syntax error")
    function = tree.body[0]
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return Verdict(False, False, "not a function")
    has_code = len(function.body) > 1 or ast.get_docstring(function) is None
    return Verdict(True, has_code, "parsed" if has_code else "docstring only")
