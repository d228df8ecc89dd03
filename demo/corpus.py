"""The training corpus: the source of the Python standard library of the running interpreter.

The split into training and held-out files is by file, from a hash of the path relative to the
standard library, so that it depends on nothing but the name: two interpreters of one version agree on
it, and a function of a held-out file is never seen in training in any form (file, snippet or chat).
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT_PER_MILLE = 40
# Not language: character maps (1.4 MB of tables), the help topics (0.7 MB of prose in string literals),
# and what the build wrote about the computer it ran on.
SKIPPED_PARTS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "data",
    "cjkencodings",
    "lib-dynload",
    "Icons",
}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
TEST_PARTS = {"test", "tests", "idle_test"}

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END)

INSTRUCTIONS = (
    "Write a Python function `{name}`. {summary}",
    "Write a function named {name}. {summary}",
    "Implement `{signature}`. {summary}",
    "{summary} Call the function `{name}`.",
    "Please write the Python function {name}: {summary}",
)
BARE_INSTRUCTIONS = (
    "Write a Python function `{name}`.",
    "Write a Python function to {words}.",
    "Implement `{signature}`.",
    "Write a function {name} in Python.",
)


@dataclass
class SourceFile:
    """One file of the standard library: its path relative to it, and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to a test suite rather than to the library proper."""
        return bool(TEST_PARTS.intersection(Path(self.path).parts))


@dataclass
class Function:
    """One function of the corpus, moved to the left margin."""

    name: str
    head: str
    source: str
    summary: str
    top_level: bool


@dataclass
class Corpus:
    """The two halves of the corpus."""

    train: list[SourceFile] = field(default_factory=list)
    held_out: list[SourceFile] = field(default_factory=list)


def is_held_out(path: str) -> bool:
    """Whether the file of this relative path (with forward slashes) is held out from training."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def _wanted(relative: Path) -> bool:
    parts = relative.parts
    return not (SKIPPED_PARTS.intersection(parts) or any(p.startswith(SKIPPED_PREFIXES) for p in parts))


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library (or the tree at `root`) and split it; exact copies are dropped."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    corpus, seen = Corpus(), set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _wanted(relative):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # some tests are broken on purpose
        if len(text) < 64 or text in seen:
            continue
        seen.add(text)
        name = relative.as_posix()
        (corpus.held_out if is_held_out(name) else corpus.train).append(SourceFile(name, text))
    return corpus


def _dedent(lines: list[str], margin: int) -> str | None:
    """Move the lines `margin` columns to the left; None where a line (of a string) does not allow it."""
    out = []
    for line in lines:
        if line.strip() and line[:margin].strip():
            return None
        out.append(line[margin:] if line.strip() else "")
    return "\n".join(out)


def _summary(node: ast.AST) -> str:
    """First sentence or line of the docstring, on one line, or the empty string."""
    paragraph = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    line = " ".join(paragraph.split("\n")[:2]) if len(paragraph) < 160 else paragraph.split("\n")[0]
    line = re.split(r"(?<=\.)\s", line.strip())[0][:200]
    return line if not line or line[-1] in ".!?" else line + "."


def functions_of(file: SourceFile, max_lines: int = 60) -> list[Function]:
    """The functions and methods of a file which have a body of their own and at most `max_lines`."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return []
    lines, found, top = file.text.split("\n"), [], set(tree.body)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first, last, body = node.lineno - 1, node.end_lineno or node.lineno, node.body[0].lineno - 1
        if last - first > max_lines or body <= first:
            continue
        source = _dedent(lines[first:last], node.col_offset)
        if source is None:
            continue
        count = max(body - first, 1)
        head = "\n".join(source.split("\n")[:count]).rstrip()
        if not head.endswith(":"):
            continue  # a comment stands between the head and the body
        found.append(Function(node.name, head, source, _summary(node), node in top))
    return found


def instruction_for(function: Function, rng: random.Random) -> str:
    """An instruction which asks for the function, from its name and the first line of its docstring."""
    signature = " ".join(function.head.split())
    words = function.name.strip("_").replace("_", " ")
    patterns = INSTRUCTIONS if function.summary else BARE_INSTRUCTIONS
    return rng.choice(patterns).format(name=function.name, signature=signature, words=words, summary=function.summary)


def chat_document(function: Function, rng: random.Random) -> str:
    """A conversation of one turn, in the format of the chat template."""
    question = instruction_for(function, rng)
    return f"{USER}\n{question}{END}\n{ASSISTANT}\n{function.source}{END}\n"
