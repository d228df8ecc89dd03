"""Replaces the expected values that come from the suite's model, facebook/opt-125m. Nothing else in the tests changes.

The values are found in the syntax tree, so no text of the suite stands here, and a suite whose tests have another
shape is refused instead of half changed.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

from reference import Continuation
from weights import SetupError

EXPECTED = "expected_output"
PROMPTS = "prompts"
Complete = Callable[[str], Continuation]
Change = tuple[ast.expr, str]
Changes = Callable[[ast.Module, Complete], list[Change]]


def rewrite(path: Path, changes: Changes, complete: Complete) -> str:
    """Write ``path`` with ``changes`` made; returns the unified diff."""
    old = path.read_text(encoding="utf-8")
    found = changes(ast.parse(old), complete)
    if not found:
        raise SetupError(f"{path.name}: no expected values of the model were found; is this another version?")
    lines = old.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = old.encode()
    for node, value in sorted(found, key=lambda change: -change[0].lineno):
        assert node.end_lineno is not None and node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = text[:begin] + value.encode() + text[end:]
    path.write_bytes(text)
    return "".join(
        difflib.unified_diff(
            old.splitlines(keepends=True), text.decode().splitlines(keepends=True), f"a/{path.name}", f"b/{path.name}"
        )
    )


def whole_texts(tree: ast.Module, complete: Complete) -> list[Change]:
    """``expected_output = [b"…"]`` of each test, with or without the prompt in it, as it was."""
    changes: list[Change] = []
    for function in _functions(tree):
        values = dict(_assignments(function))
        if PROMPTS in values and EXPECTED in values:
            prompts, expected = (ast.literal_eval(values[name]) for name in (PROMPTS, EXPECTED))
            texts = [
                (prompt if old.startswith(prompt.encode()) else "") + complete(prompt).text
                for prompt, old in zip(prompts, expected, strict=True)
            ]
            changes.append((values[EXPECTED], repr([text.encode() for text in texts])))
    return changes


def streamed_texts(tree: ast.Module, complete: Complete) -> list[Change]:
    """``expected_output = ["…", …]``: the texts of the tokens of the module's only prompt."""
    (prompt,) = ast.literal_eval(dict(_assignments(tree))["PROMPTS"])
    return [
        (value, repr(list(complete(prompt).deltas)))
        for function in _functions(tree)
        for name, value in _assignments(function)
        if name == EXPECTED and isinstance(value, ast.List)
    ]


def prompt_tokens(tree: ast.Module, complete: Complete) -> list[Change]:
    """``18 * self.inference_count``: the tokens of all prompts, where the text names a prompt metric."""
    (prompts,) = (
        ast.literal_eval(v) for f in _functions(tree) for name, v in _assignments(f) if name == "self.prompts"
    )
    all_of_them = [complete(prompt) for prompt in prompts]
    if any(continuation.finish_reason != "length" for continuation in all_of_them):
        raise SetupError("the model ends a text before 16 tokens, which the metrics test does not expect")
    count = sum(continuation.num_prompt_tokens for continuation in all_of_them)
    return [
        (value.left, str(count))
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and len(call.args) == 2 and "prompt_tokens" in ast.unparse(call.args[0])
        if isinstance(value := call.args[1], ast.BinOp) and isinstance(value.left, ast.Constant)
    ]


def shorter_text(tree: ast.Module, complete: Complete) -> list[Change]:
    """``_sampling_parameters``: no more tokens than the model gives before it ends the text of ``_prompt``.

    The test expects a text that ends for its length, with log-probabilities of its tokens alone; the token that ends a
    text has one, too, and no place in the text.
    """
    values = {name: value for c in tree.body for name, value in _assignments(c)}
    continuation = complete(ast.literal_eval(values["_prompt"]))
    if continuation.finish_reason == "length":
        return []
    given = values["_sampling_parameters"]
    return [(given, repr({**ast.literal_eval(given), "max_tokens": str(len(continuation.deltas))}))]


def _functions(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _assignments(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of the plain assignments directly in ``scope``."""
    for statement in getattr(scope, "body", ()):
        if isinstance(statement, ast.Assign):
            yield ast.unparse(statement.targets[0]), statement.value
