"""How far a prompt is: what the engine says after each step, and what a stream carries."""

from __future__ import annotations

import json

import msgspec
import pytest
from mini_engine import MiniEngine
from test_responder import STATS, Rig, Sender, rig, tokenizer  # noqa: F401 - fixtures

from flashserve.frontend.generation import Generation
from flashserve.frontend.request_parser import OutputFlags, ParsedRequest
from flashserve.protocol import GenerateRequest, PromptProgress, SamplingParams, StepOutputs, TokenOutput
from flashserve.text.completion import Completion
from parsed_requests import parsed, refused


class Watched(MiniEngine):
    """Remembers progress, in the order of all outputs."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.told: list[tuple[int, PromptProgress | None]] = []

    def _collect(self, outputs):
        self.told += [(output.request_id, output.progress) for output in outputs]
        super()._collect(outputs)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Requests whose prompt has more than ten tokens ask for progress."""

    def make(**values):
        return GenerateRequest(**values, return_progress=len(values["prompt_token_ids"]) > 10)

    monkeypatch.setattr("mini_engine.GenerateRequest", make)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_after_each_step_that_computed_a_part(run_ahead):
    engine = Watched(run_ahead=run_ahead, max_num_batched_tokens=16, num_blocks=64)
    short = engine.add(3, max_tokens=8)
    long = engine.add(40, max_tokens=2)
    engine.run()
    engine.check_answers()
    engine.check_idle()
    told = [progress for request_id, progress in engine.told if request_id == long]
    counts = [progress.processed for progress in told if progress is not None]
    assert counts == sorted(set(counts)) and counts[-1] == 40 and len(counts) >= 3
    assert told[len(counts) :] == [None] * (len(told) - len(counts))  # all before the first token
    assert {(progress.total, progress.cache) for progress in told if progress is not None} == {(40, 0)}
    assert {progress for request_id, progress in engine.told if request_id == short} == {None}


def test_what_the_cache_held_counts_as_processed():
    engine = Watched(max_num_batched_tokens=16, block_size=4)
    prompt = list(range(5000, 5040))
    engine.add(prompt, max_tokens=1)
    engine.run()
    engine.told.clear()
    engine.add([*prompt[:30], 1, 2], max_tokens=1)
    engine.run()
    assert [(p.total, p.cache, p.processed) for _, p in engine.told if p is not None] == [(32, 28, 32)]


def progress(processed):
    return PromptProgress(300, 16, processed, 1.5)


def test_a_stream_carries_the_newest_before_its_first_token(rig: Rig):  # noqa: F811
    message = GenerateRequest(1, [40], SamplingParams(max_tokens=100), 0.0, return_progress=True)
    request = ParsedRequest(message, "", True, OutputFlags(progress=True), "r")
    generation = Generation(request, sender := Sender(), [Completion(rig.tokenizer, message)])
    rig.responder.submit(generation)

    def step(*outputs):
        rig.responder.on_outputs(StepOutputs(list(outputs), STATS))
        rig.settle()

    step(TokenOutput(1, [], progress=progress(128)))
    sender.may_send.clear()  # a consumer that is slow: two steps leave in one response
    step_ids = rig.tokenizer.encode("ab", add_special_tokens=False)
    rig.responder.on_outputs(StepOutputs([TokenOutput(1, [], progress=progress(256))], STATS))
    rig.responder.on_outputs(StepOutputs([TokenOutput(1, [], progress=progress(300)), TokenOutput(1, step_ids)], STATS))
    sender.may_send.set()
    rig.settle()
    step(TokenOutput(1, step_ids, "length"))
    outputs = [response.outputs for response in sender.responses]
    found = [json.loads(output["prompt_progress"]) for output in outputs if "prompt_progress" in output]
    assert (
        found[0]
        == msgspec.structs.asdict(progress(128))
        == {"total": 300, "cache": 16, "processed": 128, "time_ms": 1.5}
    )
    assert found[-1]["processed"] == 300
    assert outputs[0]["text_output"] == b""
    assert "prompt_progress" not in outputs[-1]
    assert sender.text == "abab"


def test_only_a_stream_may_ask():
    assert parsed(text_input="a", stream=True, return_progress=True).message.return_progress
    assert not parsed(text_input="a", stream=True).message.return_progress
    assert parsed(text_input="a", parameters={"return_progress": "true", "stream": True}).message.return_progress
    refused("return_progress=true: only a stream tells how far its prompt is", text_input="a", return_progress=True)
    refused("return_progress must be true or false", text_input="a", stream=True, parameters={"return_progress": 3})
