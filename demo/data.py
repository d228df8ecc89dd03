"""Turning the corpus into batches of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from corpus import END_OF_TEXT, Corpus, Function, chat_document, functions_of
from tokenizer import encode_with_cuts
from tokenizers import Tokenizer
from torch import Tensor

# Shares of the tokens of an epoch; what is left are whole files.
CHAT_SHARE, SNIPPET_SHARE = 0.12, 0.08
# The library proper is read twice in an epoch, its tests (half as large again, and more monotonous) once.
LIBRARY_REPEATS = 2


@dataclass
class Documents:
    """The encoded training documents of an epoch, each with its end-of-text token in front."""

    documents: list[np.ndarray]
    tokens: dict[str, int]


def _take(functions: list[Function], limit: int, encode) -> list[np.ndarray]:
    taken, total = [], 0
    for function in functions:
        if total >= limit:
            break
        taken.append(encode(function))
        total += len(taken[-1])
    return taken


def build_documents(corpus: Corpus, tokenizer: Tokenizer, seed: int) -> Documents:
    """Encode the training half: whole files, single functions, and functions as conversations."""
    rng = random.Random(seed)
    separator = tokenizer.token_to_id(END_OF_TEXT)

    def encode(text: str) -> np.ndarray:
        return np.array([separator, *encode_with_cuts(tokenizer, text, rng)], dtype=np.uint16)

    files = []
    for file in corpus.train:
        files.extend(encode(file.text) for _ in range(1 if file.is_test else LIBRARY_REPEATS))
    file_tokens = sum(map(len, files))
    library, tests = [], []
    for file in corpus.train:
        (tests if file.is_test else library).extend(functions_of(file))
    rng.shuffle(library)
    rng.shuffle(tests)
    total = file_tokens / (1 - CHAT_SHARE - SNIPPET_SHARE)
    # Conversations come first from functions with a docstring: those give the better instructions.
    by_summary = sorted(library, key=lambda f: (not f.summary, not f.top_level)) + tests
    chats = _take(by_summary, int(total * CHAT_SHARE), lambda f: encode(chat_document(f, rng)))
    by_level = sorted(library, key=lambda f: not f.top_level) + tests
    snippets = _take(by_level, int(total * SNIPPET_SHARE), lambda f: encode(f.source + "\n"))
    counts = {"files": file_tokens, "chat": sum(map(len, chats)), "snippets": sum(map(len, snippets))}
    return Documents(files + chats + snippets, counts)


class Stream:
    """An endless stream of tokens: the documents in a new order in every epoch.

    The position (epoch, offset) is the whole state, so that a resumed run sees what it would have seen.
    """

    def __init__(self, documents: list[np.ndarray], seed: int) -> None:
        self.documents, self.seed = documents, seed
        self.epoch, self.offset = 0, 0
        self._tokens = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.documents))
        return np.concatenate([self.documents[i] for i in order])

    def seek(self, epoch: int, offset: int) -> None:
        """Go to a position."""
        self.epoch, self.offset = epoch, offset
        self._tokens = self._shuffled()

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """The next inputs and targets, each of `rows` x `length`."""
        need = rows * length + 1
        if self.offset + need > len(self._tokens):
            self.seek(self.epoch + 1, 0)
        block = torch.from_numpy(self._tokens[self.offset:self.offset + need].astype(np.int64))
        self.offset += need - 1
        return block[:-1].view(rows, length), block[1:].view(rows, length)


def held_out_chunks(corpus: Corpus, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """The held-out files in runs of `length` tokens, and one more so that all of them can be predicted."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    for file in corpus.held_out:
        ids = [separator, *tokenizer.encode(file.text, add_special_tokens=False).ids]
        for start in range(0, len(ids) - length, length):
            yield ids[start:start + length + 1]
