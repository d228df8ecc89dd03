"""Compiles the grammars that requests ask for, beside the steps."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from flashserve.engine.grammar.closing import MAX_CLOSING, ClosingMatcher, Closings
from flashserve.engine.grammar.judge import Judge
from flashserve.engine.grammar.matcher import GrammarMatcher
from flashserve.engine.grammar.source import compile_grammar, grammar_source, make_tokenizer
from flashserve.errors import INTERNAL, INVALID_ARG, UNAVAILABLE
from flashserve.protocol import ErrorInfo, ModelCard, StructuredOutputs
from flashserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

log = logging.getLogger(__name__)

HOLD = "grammar"
"""What a request waits for while its grammar is compiled."""
MAX_COMPILED = 64
MAX_WAITING = 64
"""Grammars that wait, also those whose requests have ended meanwhile. Good ones take some 20 ms each; of so many that
take all that the judge allows, the last waits for half a minute."""
RETRY_AFTER_MS = 1000
THREADS = 4
"""They wait for the judge's children; what they do themselves drops the interpreter's lock."""


class Grammars:
    """Compiled grammars by what was asked for; a model that nobody asks for one loads nothing.

    All methods belong to the engine's thread; others only take work and put back results.
    """

    def __init__(self, card: ModelCard, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """vocab_size: columns of the logits."""
        self._compiler = _Compiler(card, vocab_size, eos_token_ids)
        self._compiled: OrderedDict[StructuredOutputs, GrammarMatcher] = OrderedDict()
        self._waiting: dict[StructuredOutputs, list[int]] = {}
        self._todo: queue.SimpleQueue[StructuredOutputs | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[StructuredOutputs, GrammarMatcher | ErrorInfo]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def find(self, wanted: StructuredOutputs) -> GrammarMatcher | None:
        """A matcher at the beginning of a grammar that is compiled already."""
        compiled = self._compiled.get(wanted)
        if compiled is None:
            return None
        self._compiled.move_to_end(wanted)
        return compiled.copy()

    def request(self, request_id: int, wanted: StructuredOutputs) -> None:
        """Compile a grammar for a request; the result comes from :meth:`take_ready`."""
        waiting = self._waiting.get(wanted)
        if waiting is not None:  # it is being compiled
            waiting.append(request_id)
            return
        is_full = len(self._waiting) >= MAX_WAITING
        self._waiting[wanted] = [request_id]
        if is_full:
            self._done.put((wanted, ErrorInfo(UNAVAILABLE, "too many grammars wait to be compiled", RETRY_AFTER_MS)))
            return
        if len(self._threads) < min(THREADS, len(self._waiting)):
            # Daemons: what a grammar takes must not keep an engine from ending.
            thread = threading.Thread(target=self._work, name=f"grammar-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._todo.put(wanted)

    def take_ready(self) -> list[tuple[int, GrammarMatcher | ErrorInfo]]:
        """(request id, its matcher or why there is none), for what has become ready since the last call."""
        ready: list[tuple[int, GrammarMatcher | ErrorInfo]] = []
        while self._waiting and not self._done.empty():
            wanted, outcome = self._done.get()
            request_ids = self._waiting.pop(wanted)
            if isinstance(outcome, ErrorInfo):
                ready += [(request_id, outcome) for request_id in request_ids]
                continue
            ready += [(request_id, outcome.copy()) for request_id in request_ids]
            self._compiled[wanted] = outcome
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return ready

    def close(self) -> None:
        """End the threads and the helper process. Idempotent."""
        for _ in self._threads:
            self._todo.put(None)
        self._compiler.close()

    def _work(self) -> None:
        while (wanted := self._todo.get()) is not None:
            self._done.put((wanted, self._compiler.compile(wanted)))


class _Compiler:
    """What the threads share: the tokenizer as llguidance has it, and the judge."""

    def __init__(self, card: ModelCard, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._card = card
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._loaded: tuple[LLTokenizer, Judge] | None = None
        self._closings: Closings | None = None
        self._closed = False

    def compile(self, wanted: StructuredOutputs) -> GrammarMatcher | ErrorInfo:
        """A matcher, or why there is none. Never raises."""
        try:
            try:
                tokenizer, judge = self._load()
            except ValueError as error:
                return ErrorInfo(INVALID_ARG, f"structured_outputs: this model's tokenizer cannot be used: {error}")
            try:
                source = grammar_source(wanted)
                refusal = judge.refusal(source)
            except ValueError as error:
                refusal = str(error)
            if not refusal:
                matcher, refusal = compile_grammar(tokenizer, source)
            if refusal:
                return ErrorInfo(INVALID_ARG, f"structured_outputs: the {_WORDS[wanted.kind]} is refused: {refusal}")
            if not wanted.close_json:
                return GrammarMatcher(matcher, tokenizer.eos_token)
            closings = self._find_closings(tokenizer)
            closing = closings.find(matcher)
            if closing is None:
                text = f"structured_outputs.close_json: no text of this schema was found within {MAX_CLOSING} tokens"
                return ErrorInfo(INVALID_ARG, text)
            return ClosingMatcher(matcher, tokenizer.eos_token, closings, closing)
        except Exception:
            log.exception("a grammar could not be compiled")
            return ErrorInfo(INTERNAL, "structured_outputs: the grammar could not be compiled")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._loaded is not None:
                self._loaded[1].close()

    def _find_closings(self, tokenizer: LLTokenizer) -> Closings:
        with self._lock:
            if self._closings is None:
                self._closings = Closings(tokenizer)
            return self._closings

    def _load(self) -> tuple[LLTokenizer, Judge]:
        """At the first use: a quarter of a second with 49k tokens, some seconds with 152k."""
        with self._lock:
            if self._closed:
                raise OSError("the engine is ending")
            if self._loaded is None:
                tokenizer = Tokenizer.from_card(self._card)
                setup = (tokenizer.to_json(), max(self._vocab_size, tokenizer.vocab_size), self._eos_token_ids)
                self._loaded = make_tokenizer(*setup), Judge(*setup)
                log.info("loaded the tokenizer for structured outputs (process %d)", os.getpid())
            return self._loaded


_WORDS = {"json": "schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}
