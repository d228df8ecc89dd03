"""Requests for several samples in the stub: an entry for each in every response, and one end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_responder import Rig, Sender, tokenizer  # noqa: F401 - a fixture

from flashserve.protocol import Abort
from flashserve.text.tokenizer import Tokenizer


@pytest.fixture
def rig(tokenizer: Tokenizer) -> Iterator[Rig]:  # noqa: F811
    rig = Rig(tokenizer)
    yield rig
    rig.responder.stop()
    assert not rig.responder.open_requests


def texts(sender: Sender) -> list[str]:
    """What each sample's deltas make together."""
    columns = zip(*(response.outputs["text_output"] for response in sender.responses), strict=True)
    return [b"".join(column).decode() for column in columns]


def last(sender: Sender, name: str) -> Any:
    return sender.responses[-1].outputs[name]


@pytest.mark.parametrize("stream", [False, True])
def test_each_sample_has_its_entry_and_the_last_one_ends_the_request(rig: Rig, stream: bool) -> None:
    generation, sender = rig.open(stream, n=3)
    for index, text in enumerate(("abc", "de\0", "f")):
        rig.output(generation, text, index=index)
    rig.settle()
    rig.output(generation, "g", "length", index=1)
    rig.output(generation, "h", "stop", index=0)
    rig.settle()
    assert not sender.final.is_set()
    rig.output(generation, "j", index=2)
    rig.output(generation, "", "length", index=2)
    assert sender.final.wait(5)
    assert texts(sender) == ["abc", "de\0g", "fj"]  # the token that is the reason to stop is no text
    assert last(sender, "finish_reason") == [b"stop", b"length", b"length"]
    counted = [sum(r.outputs["num_output_tokens"][i] for r in sender.responses) for i in range(3)]
    tokens = [("abc", "h"), ("de\0", "g"), ("f", "j")]
    assert counted == [sum(len(rig.tokenizer.encode(text)) for text in own) for own in tokens]
    assert len(sender.responses) == 1 or stream
    assert sum(rig.counts().values()) == 1


def test_a_stop_string_ends_its_sample_in_the_engine_too_and_the_last_one_the_request(rig: Rig) -> None:
    generation, sender = rig.open(n=2, stop=("x",))
    rig.output(generation, "abx", index=1)
    rig.settle()
    assert rig.to_engine[1:] == [Abort([], [(generation.id, 1)])]
    rig.output(generation, "", "abort", index=1)  # the engine's answer
    rig.output(generation, "cdx", index=0)
    assert sender.final.wait(5)
    assert rig.to_engine[2:] == [Abort([generation.id])]
    assert texts(sender) == ["cd", "ab"]
    assert last(sender, "finish_reason") == [b"stop", b"stop"]


@pytest.mark.parametrize("reason", ["abort", "deadline", "error"])
def test_an_error_of_one_sample_is_the_requests(rig: Rig, reason: str) -> None:
    generation, sender = rig.open(n=2)
    rig.output(generation, "abc", "length", index=0)
    rig.output(generation, "", reason, index=1)
    assert sender.final.wait(5)
    assert sender.error and texts_before_the_error(sender) == ["abc", ""]


def texts_before_the_error(sender: Sender) -> list[str]:
    sender.responses = sender.responses[:-1]
    return texts(sender)
