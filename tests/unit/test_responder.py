"""What only a race can bring about, with Triton's side played: one FINAL for each request, whatever meets whatever."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flashserve.errors import Cancelled, Unavailable
from flashserve.frontend import senders
from flashserve.frontend.generation import Generation
from flashserve.frontend.metrics import Metrics
from flashserve.frontend.request_parser import OutputFlags, ParsedRequest
from flashserve.frontend.responder import Responder
from flashserve.frontend.responses import ResponseBuilder
from flashserve.model_card import ModelCard, read_model_card
from flashserve.protocol import (
    Abort,
    EngineLimits,
    EngineReady,
    GenerateRequest,
    SamplingParams,
    Stats,
    StepOutputs,
    TokenOutput,
)
from flashserve.text.completion import Completion
from flashserve.text.tokenizer import Tokenizer
from tiny_models import write_byte_level_tokenizer

FINAL = 1
STATS = Stats(0, 0, 8, 8, 0, 0, 0, 0, 0, 0, 0)
DEAD = Unavailable("the engine process was killed", retry_after_ms=500)
UNLOADED = Cancelled("the model was unloaded", reason="shutdown")


class Pb:
    """The few names of triton_python_backend_utils that building a response takes."""

    class TritonError:
        UNAVAILABLE, CANCELLED, INTERNAL, INVALID_ARG = range(4)

        def __init__(self, message: str, code: int) -> None:
            self.message = message

    @staticmethod
    def Tensor(name: str, array: Any) -> tuple[str, Any]:  # noqa: N802
        return name, array[0] if len(array) == 1 else list(array)

    @staticmethod
    def InferenceResponse(tensors: Any = (), error: Any = None) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(error=error.message if error else "", outputs=dict(tensors))


class Sender:
    """Triton's response sender: remembers, and insists on the rules."""

    def __init__(self) -> None:
        self.responses: list[SimpleNamespace] = []
        self.final = threading.Event()
        self.may_send = threading.Event()
        self.may_send.set()
        self.sending = threading.Event()
        self.cancelled = False
        self.asked_after_final = 0
        self.broken = False

    def send(self, response: SimpleNamespace, flags: int) -> None:
        self.sending.set()
        self.may_send.wait(5)
        assert not self.final.is_set(), "a response after FINAL"
        if self.broken:
            raise RuntimeError("Triton does not take it")
        self.responses.append(response)
        if flags == FINAL:
            self.final.set()

    def is_cancelled(self) -> bool:
        self.asked_after_final += self.final.is_set()
        return self.cancelled

    @property
    def text(self) -> str:
        return "".join(response.outputs.get("text_output", b"").decode() for response in self.responses)

    @property
    def error(self) -> str:
        return self.responses[-1].error


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_level_tokenizer(folder)
    return Tokenizer.from_card(read_model_card(folder))


class Rig:
    """A responder between an engine and a Triton that the test plays."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.metrics = Metrics()
        self.responder = Responder(ResponseBuilder(Pb), self.metrics)
        self.to_engine: list[GenerateRequest | Abort] = []
        self.before_sending: Callable[[Any], None] = lambda message: None
        self.responder.start(self._send)
        self._ids = 0

    def _send(self, message: GenerateRequest | Abort) -> None:
        self.before_sending(message)
        self.to_engine.append(message)

    def generation(self, stream: bool = True, **params: Any) -> Generation:
        self._ids += 1
        message = GenerateRequest(self._ids, [40], SamplingParams(max_tokens=100, **params), time.monotonic())
        outputs = OutputFlags(finish_reason=True, num_output_tokens=True)
        parsed = ParsedRequest(message, "", stream, outputs, f"r{self._ids}")
        return Generation(parsed, Sender(), [Completion(self.tokenizer, message) for _ in range(message.params.n)])

    def open(self, stream: bool = True, **params: Any) -> tuple[Generation, Sender]:
        generation = self.generation(stream, **params)
        self.responder.submit(generation)
        return generation, generation.sender

    def output(self, generation: Generation, text: str = "", reason: Any = None, index: int = 0) -> None:
        """The engine's thread delivers a step with tokens of this text."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        self.responder.on_outputs(StepOutputs([TokenOutput(generation.id, tokens, reason, index=index)], STATS))

    def counts(self) -> dict[str, float]:
        """Ends by kind so far."""
        names = ("vllm:request_success_total", "flashserve:requests_cancelled_total", "flashserve:request_errors_total")
        return {
            labels[0][1]: value
            for (name, labels), value in self.metrics.take_increments().items()
            if name in names and labels and value
        }

    def settle(self) -> None:
        """Until the sender threads have done all that is queued by now."""
        for key in range(senders.NUM_THREADS):
            done = threading.Event()
            self.responder._senders.put(key, done.set)
            assert done.wait(5)


@pytest.fixture
def rig(tokenizer: Tokenizer) -> Iterator[Rig]:
    rig = Rig(tokenizer)
    yield rig
    rig.responder.stop()
    assert not rig.responder.open_requests
    assert not rig.responder._senders.alive


# --- engines ------------------------------------------------------------------------------------------------


def test_the_gauges_of_memory_are_those_of_the_engine_that_is_there(rig: Rig) -> None:
    for model_bytes in (100, 200):
        limits = EngineLimits(4096, 8, 512, 16, 256, 512, (0,), "float32", "null", model_bytes=model_bytes)
        rig.responder.on_ready(EngineReady(limits, ModelCard("", {}, {})))
        assert rig.metrics.take_gauges()["flashserve:model_bytes", ()] == model_bytes


# --- cancellations -----------------------------------------------------------------------------------------


def test_an_abort_that_overtakes_its_request_is_repeated(rig: Rig) -> None:
    generation = rig.generation()

    def cancel_first(message: Any) -> None:
        if isinstance(message, GenerateRequest):
            rig.responder.cancel(generation)

    rig.before_sending = cancel_first
    rig.responder.submit(generation)
    assert [type(message) for message in rig.to_engine] == [Abort, GenerateRequest, Abort]
    rig.output(generation, reason="abort")


def test_a_drain_that_overtakes_a_request_reaches_the_engine_too(rig: Rig) -> None:
    generation = rig.generation()

    def drain_first(message: Any) -> None:
        if isinstance(message, GenerateRequest):
            rig.responder.fail_all(UNLOADED)
            rig.settle()

    rig.before_sending = drain_first
    rig.responder.submit(generation)
    assert generation.sender.final.wait(5)
    assert [type(message) for message in rig.to_engine] == [Abort, GenerateRequest, Abort]


def test_final_follows_the_engine_s_confirmation(rig: Rig) -> None:
    generation, sender = rig.open()
    rig.responder.cancel(generation)
    rig.responder.cancel(generation)
    rig.settle()
    assert not sender.final.is_set()
    rig.output(generation, reason="abort")
    assert sender.final.wait(5)
    assert sum(isinstance(message, Abort) for message in rig.to_engine) == 1
    assert rig.counts() == {"client": 1}


def test_a_cancellation_that_comes_too_late_is_a_success(rig: Rig) -> None:
    generation, sender = rig.open()
    rig.responder.cancel(generation)
    rig.output(generation, "abc", "length")
    assert sender.final.wait(5)
    assert (sender.text, sender.error) == ("abc", "")
    assert rig.counts() == {"length": 1}


def test_a_death_of_the_engine_during_a_cancellation_ends_the_request_once(rig: Rig) -> None:
    generation, sender = rig.open()
    rig.responder.cancel(generation)
    rig.responder.on_dead(DEAD)
    rig.output(generation, reason="abort")
    assert sender.final.wait(5)
    rig.settle()
    assert len(sender.responses) == 1
    assert rig.counts() == {"UNAVAILABLE": 1}


def test_triton_is_not_asked_about_a_request_whose_final_is_on_its_way(rig: Rig) -> None:
    """With FINAL, tritonserver frees what the question would look at."""
    generation, sender = rig.open()
    asking, may_answer = threading.Event(), threading.Event()

    def is_cancelled() -> bool:
        asking.set()
        may_answer.wait(5)
        return False

    sender.is_cancelled = is_cancelled  # type: ignore[method-assign]
    watcher = threading.Thread(target=generation.client_is_gone)
    watcher.start()
    asking.wait(5)
    rig.output(generation, "abc", "length")
    assert not sender.final.wait(0.1), "FINAL did not wait for the question under way"
    may_answer.set()
    assert sender.final.wait(5)
    watcher.join(5)
    asking.clear()
    assert not generation.client_is_gone()
    assert not asking.is_set()


# --- stop strings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_generates_beyond_a_stop_string_does_not_count(rig: Rig, stream: bool) -> None:
    generation, sender = rig.open(stream, stop=("STOP",))
    sender.may_send.clear()
    for text in ("a", "b", "S", "T", "O", "P", "c", "d"):
        rig.output(generation, text)
    sender.may_send.set()
    assert sender.final.wait(5)
    rig.output(generation, "e")
    rig.output(generation, reason="abort")
    rig.settle()
    assert sender.text == "ab"
    assert sum(int(response.outputs["num_output_tokens"]) for response in sender.responses) == 6
    assert sender.responses[-1].outputs["finish_reason"] == b"stop"
    assert sum(isinstance(message, Abort) for message in rig.to_engine) == 1
    assert rig.counts() == {"stop": 1}


def test_a_stop_string_in_the_last_tokens_needs_no_abort(rig: Rig) -> None:
    generation, sender = rig.open(stop=("P",))
    rig.output(generation, "abP", "length")
    assert sender.final.wait(5)
    assert (sender.text, rig.counts()) == ("ab", {"stop": 1})
    assert not [message for message in rig.to_engine if isinstance(message, Abort)]


def test_tokens_that_came_before_a_failure_are_delivered_first(rig: Rig) -> None:
    generation, sender = rig.open()
    sender.may_send.clear()
    rig.output(generation, "a")
    rig.output(generation, "bc")
    rig.responder.on_dead(DEAD)
    rig.responder.fail_all(UNLOADED)
    sender.may_send.set()
    assert sender.final.wait(5)
    assert sender.text == "abc"
    assert sender.error == "the engine process was killed [code=UNAVAILABLE retry_after_ms=500]"
    assert rig.counts() == {"UNAVAILABLE": 1}


def test_an_end_that_came_before_the_engine_s_death_is_a_success(rig: Rig) -> None:
    generation, sender = rig.open(stream=False)
    sender.may_send.clear()
    _, other = rig.open()
    rig.output(generation, "abc", "length")
    rig.responder.on_dead(DEAD)
    sender.may_send.set()
    assert sender.final.wait(5)
    assert (sender.text, sender.error) == ("abc", "")
    assert other.final.wait(5)
    assert "was killed" in other.error


def test_a_failure_before_the_first_token_is_the_only_response(rig: Rig) -> None:
    generation, sender = rig.open()
    rig.responder.fail(generation, UNLOADED)
    assert sender.final.wait(5)
    rig.output(generation, "late")
    rig.output(generation, reason="abort")
    rig.settle()
    (response,) = sender.responses
    assert response.error == "the model was unloaded [code=CANCELLED reason=shutdown]"
    assert rig.counts() == {"shutdown": 1}


@pytest.mark.parametrize(("raised", "words"), [(DEAD, "was killed"), (OverflowError(), "could not be handed")])
def test_a_request_that_does_not_reach_the_engine_is_answered(rig: Rig, raised: Exception, words: str) -> None:
    def fail(message: Any) -> None:
        if isinstance(message, GenerateRequest):
            raise raised

    rig.before_sending = fail
    _, sender = rig.open()
    assert sender.final.wait(5)
    assert words in sender.error


def test_a_draining_model_refuses_what_is_new_and_goes_on_with_what_is_open(rig: Rig) -> None:
    generation, sender = rig.open()
    rig.responder.refuse_new(Unavailable("the model is being unloaded", retry_after_ms=2000))
    _, refused = rig.open()
    assert refused.final.wait(5)
    assert "is being unloaded" in refused.error
    rig.output(generation, "abc", "length")
    assert sender.final.wait(5)
    assert sender.text == "abc"


def test_one_request_that_breaks_the_text_layer_or_cannot_be_sent_leaves_the_others_alone(rig: Rig) -> None:
    broken_text, broken_sender, healthy = rig.open(), rig.open(), rig.open()
    broken_text[0].completions[0] = None  # type: ignore[call-overload]
    broken_sender[1].broken = True
    for generation, _ in (broken_text, broken_sender, healthy):
        rig.output(generation, "abc", "length")
    assert healthy[1].final.wait(5)
    rig.settle()
    assert "the request failed in the frontend [code=INTERNAL]" in broken_text[1].error
    assert healthy[1].text == "abc"
    assert not rig.responder.open_requests


def test_tokens_that_pile_up_leave_in_one_response(rig: Rig) -> None:
    generation, sender = rig.open()
    sender.may_send.clear()
    rig.output(generation, "a")
    assert sender.sending.wait(5)  # the others come while this one is on its way
    for letter in "bcdefgh":
        rig.output(generation, letter)
    rig.output(generation, "i", "length")
    sender.may_send.set()
    assert sender.final.wait(5)
    assert [response.outputs["text_output"] for response in sender.responses] == [b"a", b"bcdefghi"]
    assert sum(int(response.outputs["num_output_tokens"]) for response in sender.responses) == 9


def test_stop_tells_requests_that_are_still_open(rig: Rig) -> None:
    _, sender = rig.open()
    rig.responder.stop()
    assert "is being unloaded" in sender.error


def test_whatever_meets_whatever_every_request_ends_exactly_once(rig: Rig) -> None:
    generations: list[Generation] = []
    finished = threading.Event()

    def engine(seed: int) -> None:
        chance = random.Random(seed)
        while not finished.is_set():
            for generation in list(generations)[-20:]:
                rig.output(generation, "x", chance.choice([None, None, None, "length", "abort", "deadline"]))
            if chance.random() < 0.02:
                rig.responder.on_dead(DEAD)

    def watcher() -> None:
        while not finished.is_set():
            for generation in rig.responder.open_requests:
                if not generation.cancelled and generation.client_is_gone():
                    rig.responder.cancel(generation)
                else:
                    rig.responder.keep_alive(generation)

    threads = [threading.Thread(target=engine, args=(1,)), threading.Thread(target=watcher)]
    for thread in threads:
        thread.start()
    chance = random.Random(2)
    for _ in range(500):
        generation = rig.generation(stream=chance.random() < 0.7, stop=("xxxx",) if chance.random() < 0.3 else ())
        generation.sender.cancelled = chance.random() < 0.3
        generations.append(generation)
        rig.responder.submit(generation)
    assert all(generation.sender.final.wait(10) for generation in generations[:-20])
    finished.set()
    for thread in threads:
        thread.join(5)
    rig.responder.fail_all(UNLOADED)
    assert all(generation.sender.final.wait(10) for generation in generations)
    rig.settle()
    assert sum(rig.counts().values()) == len(generations)
    assert not sum(generation.sender.asked_after_final for generation in generations)
