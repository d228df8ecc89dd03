"""Text that a grammar forces: taken without steps of its own, and the same text as with them."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest

from driver import Driver, Engine
from flashserve import LLM
from flashserve.config import EngineConfig
from flashserve.engine.core import EngineCore, build_core
from flashserve.engine.grammar.source import compile_grammar, grammar_source, make_tokenizer
from flashserve.model_card import read_model_card
from flashserve.models.registry import open_model
from flashserve.protocol import GenerateRequest, SamplingParams
from flashserve.structured_outputs import parse_structured_outputs
from flashserve.text.tokenizer import Tokenizer
from random_grammars import random_regex, random_schema
from real_models import smollm2
from tiny_models import EOS_ID, VOCAB_SIZE


def thing(**properties: object) -> dict:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


ORDER = thing(
    customer_identifier={"enum": [1, 2, 17]},
    delivery_instructions={"type": "string", "maxLength": 5},
    requires_signature={"type": "boolean"},
    address=thing(postal_code={"type": "string", "maxLength": 5}, country={"enum": ["FR", "IT"]}),
)
COMPACT = parse_structured_outputs({"json": ORDER, "disable_any_whitespace": True})
SPACED = parse_structured_outputs({"json": ORDER})
PROMPT = list(range(3, 20))
PENALTIES = {"presence_penalty": 1.2, "frequency_penalty": 0.8, "repetition_penalty": 1.3}
DRY = {"dry_multiplier": 3.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_breaker_ids": (5,)}
RANDOM = {"temperature": 0.9, "seed": 5, "min_p": 0.01, "xtc_probability": 0.5, "xtc_threshold": 0.01}
SETTINGS = {"dtype": "float32", "max_num_seqs": 6, "max_num_batched_tokens": 32, "max_model_len": 192}
NO_JUMPS = {"logprobs": 0}
"""Requests for log-probabilities take a step for each token."""


@pytest.fixture(scope="module")
def reader(folder):
    """The tiny model's tokenizer, as llguidance has it."""
    return make_tokenizer(Tokenizer.from_card(read_model_card(folder)).to_json(), VOCAB_SIZE, [EOS_ID])


@pytest.fixture
def start(on_each_device):
    wishes = {"max_tokens": 160, "structured_outputs": COMPACT}
    return lambda **settings: Engine(on_each_device(**{**SETTINGS, **settings}), **wishes)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, dtype="float32", num_threads=1, max_num_seqs=8) as engine:
        yield engine


def run(core: EngineCore, *requests: dict, prompt: list[int] = PROMPT) -> dict[tuple[int, int], list[int]]:
    """Tokens by request and sample."""
    tokens: dict[tuple[int, int], list[int]] = {}
    for index, params in enumerate(requests):
        own = SamplingParams(**{"max_tokens": 160, "structured_outputs": COMPACT, **params})
        core.handle(GenerateRequest(index, prompt, own, arrival=float(index)))
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    stats = core.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    return tokens


def allowed(matcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


@pytest.fixture(params=["tiny", "SmolLM2"])
def any_reader(request, reader):
    """A tokenizer of 512 tokens, and one whose tokens are often longer than what is forced."""
    if request.param == "tiny":
        return reader
    files = open_model(EngineConfig(str(smollm2())))
    return make_tokenizer(Tokenizer.from_card(files.card).to_json(), 49152, [2])


@pytest.mark.parametrize("kind", ["schemas", "compact schemas", "regular expressions"])
def test_what_is_forced_is_all_that_masks_allow(kind, any_reader):
    forced = 0
    for seed in range(100):
        rng = random.Random(seed)
        given = {"regex": random_regex(rng)} if kind == "regular expressions" else {"json": random_schema(rng)}
        wanted = parse_structured_outputs({**given, "disable_any_whitespace": kind == "compact schemas"})
        matcher, error = compile_grammar(any_reader, grammar_source(wanted))
        assert not error
        for _ in range(60):
            for token in matcher.compute_ff_tokens():
                assert allowed(matcher) == [token]
                assert matcher.consume_token(token)
                forced += 1
            if matcher.is_stopped():
                break
            choices = allowed(matcher)
            assert len(choices) > 1 or choices == [any_reader.eos_token], "what is forced is found"
            matcher.consume_token(rng.choice(choices))
    assert forced > 100


@pytest.mark.parametrize("wanted", [COMPACT, SPACED], ids=["compact", "with blanks"])
def test_the_text_is_that_of_a_plain_loop(wanted, folder, reader, drive):
    """Greedy, a prompt that grows by a token at a time."""
    driver: Driver = drive(folder, **SETTINGS)
    matcher, _ = compile_grammar(reader, grammar_source(wanted))
    expected: list[int] = []
    while not matcher.is_stopped():
        logits = driver.prompt_logits([*PROMPT, *expected])[-1]
        choices = allowed(matcher)
        expected.append(choices[int(logits[choices].argmax())])
        assert matcher.consume_token(expected[-1])
    core = build_core(driver.resolved, driver.runner, "test")
    tokens = run(core, {"temperature": 0, "structured_outputs": wanted})[0, 0]
    assert tokens == [*expected, EOS_ID]
    steps = core.scheduler.stats().steps
    assert steps < len(tokens) * (0.4 if wanted is COMPACT else 0.75)


@pytest.mark.parametrize("wishes", [{"temperature": 0}, RANDOM, {**PENALTIES, **RANDOM}, {**PENALTIES, **DRY}, DRY])
def test_the_text_is_that_of_single_steps(wishes, start):
    """What looks back on the text sees what was forced; the draws are those of the same places."""
    texts, steps = [], []
    for more in ({}, NO_JUMPS):
        core = start().core
        texts.append(run(core, *({**wishes, "seed": seed, **more} for seed in range(4))))
        steps.append(core.scheduler.stats().steps)
    assert texts[0] == texts[1]
    assert steps[0] < 0.5 * steps[1]


@pytest.mark.parametrize("budget", [32, 8])
def test_each_token_is_counted_once(budget, start, monkeypatch):
    """budget: with 8, forced text is computed in parts."""
    engine, plans = start(max_num_batched_tokens=budget), []
    submit = engine.runner.submit
    monkeypatch.setattr(engine.runner, "submit", lambda plan: plans.append(plan) or submit(plan))
    engine.add(0, PROMPT, **PENALTIES)
    while not plans:  # until the grammar is compiled
        engine.step()
    sequence = engine.core.scheduler._requests[0].sequences[0]
    parts = 0
    while sequence.finish_reason is None:
        engine.step()
        (row,) = plans[-1].rows
        parts += row.num_logits == 0
        if row.num_logits and not sequence.num_pending:
            sampled = sequence.token_ids[len(PROMPT) : row.start + row.num_tokens + 1]
            counts = engine.runner._processor._counts[row.slot]
            assert counts.tolist() == np.bincount(sampled, minlength=VOCAB_SIZE).tolist()
    assert (parts > 2) == (budget == 8)


def test_samples_of_one_prompt(start):
    wishes = {**RANDOM, **PENALTIES}
    together = run(start().core, {**wishes, "n": 4})
    alone = {(0, index): run(start().core, {**wishes, "seed": 5 + index})[0, 0] for index in range(4)}
    assert together == alone
    assert len(set(map(tuple, together.values()))) > 1


def test_texts_that_are_preempted_go_on_as_they_would_have(start):
    """With so small a budget that forced text is often computed in parts."""
    requests = [{**PENALTIES, **RANDOM, "seed": seed} for seed in range(5)]
    roomy = run(start().core, *requests)
    tight = start(num_gpu_blocks_override=20, max_num_batched_tokens=8, enable_prefix_caching=False).core
    assert run(tight, *requests) == roomy
    assert tight.scheduler.stats().preemptions > 0


def test_a_stop_string_within_forced_text(llm):
    params = {"temperature": 0, "max_tokens": 160, "structured_outputs": {"json": ORDER}, "stop": ["ivery_instr"]}
    result = llm.generate("x", params)[0]
    assert result.finish_reason == "stop"
    assert result.text.endswith('"del')
    assert llm.tokenizer.decode(result.token_ids[:-1]) in result.text + "ivery_inst", "ends with the token that stops"
    shown = llm.generate("x", {**params, "include_stop_str_in_output": True})[0]
    assert shown.text == result.text + "ivery_instr"


def test_max_tokens_within_forced_text(llm):
    params = {"temperature": 0, "structured_outputs": {"json": ORDER, "disable_any_whitespace": True}}
    whole = llm.generate("x", {**params, "max_tokens": 160})[0]
    for most in range(1, len(whole.token_ids)):
        result = llm.generate("x", {**params, "max_tokens": most})[0]
        assert result.token_ids == whole.token_ids[:most] and result.finish_reason == "length"
    assert llm.stats().free_blocks == llm.stats().total_blocks


def test_texts_that_are_closed_have_forced_text_too(llm):
    wanted = {"json": ORDER, "close_json": True, "disable_any_whitespace": True}
    before = llm.stats().steps
    params = [{"temperature": 1, "seed": s, "max_tokens": 93 + s, "structured_outputs": wanted} for s in range(16)]
    results = [llm.generate("x", each)[0] for each in params]
    for each, result in zip(params, results, strict=True):
        jsonschema.validate(json.loads(result.text), ORDER)
        assert len(result.token_ids) <= each["max_tokens"]
    assert {result.finish_reason for result in results} == {"length", "stop"}
    assert llm.stats().steps - before < 0.5 * sum(len(result.token_ids) for result in results)
