"""Structured output: grammars against a random choice of tokens, and engines that keep several at once."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from functools import cache
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from driver import Engine, load
from flashserve import LLM
from flashserve.engine.grammar import service
from flashserve.engine.grammar.closing import ClosingMatcher, Closings
from flashserve.engine.grammar.judge import Judge
from flashserve.engine.grammar.matcher import GrammarMatcher
from flashserve.engine.grammar.service import Grammars
from flashserve.engine.grammar.source import compile_grammar, grammar_source, make_tokenizer
from flashserve.errors import INVALID_ARG, UNAVAILABLE, InvalidArgument
from flashserve.model_card import read_model_card
from flashserve.protocol import Abort, ErrorInfo, SamplingParams, StructuredOutputs
from flashserve.structured_outputs import parse_structured_outputs
from flashserve.text.tokenizer import Tokenizer
from flashserve_gateway.chat import read_message
from flashserve_gateway.output.tools import ToolReader
from flashserve_gateway.structure import call_form
from hostile_grammars import HOSTILE
from lazy_device import LazyCpu
from random_grammars import random_regex, random_schema
from tiny_models import EOS_ID, VOCAB_SIZE

NUM_SCHEMAS, NUM_REGEXES = 500, 200
MAX_TOKENS = 1500
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_card(read_model_card(folder))


@pytest.fixture(scope="module")
def matcher_of(tokenizer):
    """The matcher at the beginning of what a request asks for."""
    reader = make_tokenizer(tokenizer.to_json(), VOCAB_SIZE, [EOS_ID])

    @cache
    def make(wanted: StructuredOutputs) -> GrammarMatcher:
        matcher, error = compile_grammar(reader, grammar_source(wanted))
        assert not error, (wanted, error)
        return GrammarMatcher(matcher, EOS_ID)

    return make


@pytest.fixture(scope="module")
def closing_matcher_of(tokenizer, matcher_of):
    """The same, of texts that are closed."""
    closings = Closings(make_tokenizer(tokenizer.to_json(), VOCAB_SIZE, [EOS_ID]))

    def make(schema: dict) -> ClosingMatcher:
        matcher = matcher_of(form(json=schema)).copy()._matcher
        closing = closings.find(matcher)
        assert closing is not None, schema
        return ClosingMatcher(matcher, EOS_ID, closings, closing)

    return make


@pytest.fixture
def grammars(folder):
    running = Grammars(read_model_card(folder), VOCAB_SIZE, (EOS_ID,))
    yield running
    running.close()


def form(**given) -> StructuredOutputs:
    return parse_structured_outputs(given)


def random_text(matcher: GrammarMatcher, tokenizer: Tokenizer, rng: random.Random) -> str | None:
    """A text of the tokens that it allows, any of them each time. None if it does not end."""
    tokens, has_ended = random_tokens(matcher, rng, MAX_TOKENS)
    return tokenizer.decode(tokens) if has_ended else None


def random_tokens(matcher: GrammarMatcher, rng: random.Random, most: int) -> tuple[list[int], bool]:
    """At most so many, and whether nothing can follow them."""
    tokens: list[int] = []
    while len(tokens) < most:
        bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[:VOCAB_SIZE]).tolist()
        assert allowed
        token = rng.choice(allowed)
        closing = matcher.ends_with(token, most - len(tokens) - 1)
        if closing is not None:
            return [*tokens, *closing], True
        assert matcher.take(token)
        if token != EOS_ID:
            tokens.append(token)
        if matcher.is_done:
            return tokens, True
    return tokens, False


def answers(grammars: Grammars, *wanted: StructuredOutputs) -> list[GrammarMatcher | ErrorInfo]:
    """What the service says to each of them, asked together."""
    for index, each in enumerate(wanted):
        grammars.request(index, each)
    found: dict[int, GrammarMatcher | ErrorInfo] = {}
    while len(found) < len(wanted):
        time.sleep(0.002)
        found.update(grammars.take_ready())
    return [found[index] for index in range(len(wanted))]


# --- grammars ------------------------------------------------------------------------------------------------------


def test_random_schemas_give_valid_json(matcher_of, tokenizer):
    ended = 0
    for seed in range(NUM_SCHEMAS):
        rng = random.Random(seed)
        schema = random_schema(rng)
        text = random_text(matcher_of(form(json=schema)).copy(), tokenizer, rng)
        if text is None:
            continue
        ended += 1
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert ended > 0.95 * NUM_SCHEMAS


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, NUM_SCHEMAS), marks=pytest.mark.slow)])
def test_random_schemas_are_closed_whatever_there_is_room_for(seeds, closing_matcher_of, tokenizer):
    for seed in seeds:
        rng = random.Random(seed)
        schema = random_schema(rng)
        matcher = closing_matcher_of(schema)
        for more in (0, 1, rng.randrange(2, 30), rng.randrange(30, 300)):
            most = matcher.least_tokens + more
            tokens, _ = random_tokens(matcher.copy(), rng, most)
            assert len(tokens) <= most
            jsonschema.Draft202012Validator(schema).validate(json.loads(tokenizer.decode(tokens)))


@pytest.mark.parametrize(
    ("schema", "most"),
    [
        ({"type": "string", "minLength": 300}, 302),
        ({"type": "string", "format": "uuid"}, 40),
        ({"type": "integer", "multipleOf": 1000, "minimum": 1}, 6),
        ({"type": "number", "exclusiveMinimum": 4.28, "maximum": 36.48}, 4),
        ({"type": "array", "items": {"type": "string"}, "minItems": 20}, 80),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}}]}}}, 2),
    ],
    ids=lambda value: "" if isinstance(value, int) else json.dumps(value)[:40],
)
def test_short_ends_are_found(schema, most, closing_matcher_of):
    assert 0 < closing_matcher_of(schema).least_tokens <= most


def test_random_regular_expressions_match(matcher_of, tokenizer):
    ended = 0
    for seed in range(NUM_REGEXES):
        rng = random.Random(seed)
        regex = random_regex(rng)
        text = random_text(matcher_of(form(regex=regex)).copy(), tokenizer, rng)
        if text is not None:
            ended += 1
            assert re.fullmatch(regex, text), (regex, text)
    assert ended > 0.95 * NUM_REGEXES


@pytest.mark.parametrize(
    "choices",
    [["yes", "no"], ["a", "ab", "abc"], ['say "hi"', "back\\slash", "new\nline", "日本 é"]],
    ids=["words", "beginnings of each other", "signs"],
)
def test_choices_are_taken_literally(choices, matcher_of, tokenizer):
    rng = random.Random(1)
    seen = {random_text(matcher_of(form(choice=choices)).copy(), tokenizer, rng) for _ in range(60)}
    assert seen == set(choices)


def test_white_space_is_bounded(matcher_of, tokenizer):
    rng = random.Random(2)
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    texts = [random_text(matcher_of(form(json=schema)).copy(), tokenizer, rng) for _ in range(50)]
    assert any(" " in text for text in texts)
    assert not any(re.search(r"\s{9}", text) for text in texts)
    compact = form(json=schema, disable_any_whitespace=True)
    assert not any(re.search(r"\s", random_text(matcher_of(compact).copy(), tokenizer, rng)) for _ in range(20))
    own = form(json=schema, whitespace_pattern=" ")
    assert "[ " in random_text(matcher_of(own).copy(), tokenizer, rng)


def test_a_schemas_own_options_do_not_count(matcher_of, tokenizer):
    schema = {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 1}
    own = {"x-guidance": {"whitespace_pattern": "#"}, **schema}
    text = random_text(matcher_of(form(json=own)).copy(), tokenizer, random.Random(3))
    assert "#" not in text


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_that_the_gateway_asks_for_are_read_as_calls(parallel, matcher_of, tokenizer):
    tools = [
        {"type": "function", "function": {"name": 'say "it"', "parameters": PLACE}},
        {"type": "function", "function": {"name": "clock"}},
    ]
    matcher = matcher_of(parse_structured_outputs(call_form(tools, parallel)))
    rng, counts, marks = random.Random(4), set(), set()
    for _ in range(30):
        text = random_text(matcher.copy(), tokenizer, rng)
        assert text is not None
        message = read_message([*(reader := ToolReader(['say "it"', "clock"])).feed(text), *reader.end()])
        assert message.calls and not message.text.strip(), text
        for name, arguments in message.calls:
            jsonschema.validate(json.loads(arguments), PLACE if name == 'say "it"' else {"maxProperties": 0})
        counts.add(len(message.calls))
        marks.add(text[0])
    assert marks == {"<", "{"}
    assert (counts == {1}) == (not parallel)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_compiled_is_refused_with_the_reason(grammars):
    outcomes = answers(grammars, *(form(**given) for given in HOSTILE.values()))
    for name, outcome in zip(HOSTILE, outcomes, strict=True):
        assert isinstance(outcome, ErrorInfo), name
        assert outcome.code == INVALID_ARG, (name, outcome)
        assert re.match(r"structured_outputs: the (schema|regular expression|grammar) is refused: .", outcome.message)
    good = answers(grammars, form(json=PLACE))
    assert isinstance(good[0], GrammarMatcher), good


def test_what_only_looks_hostile_is_no_trouble(grammars, tokenizer):
    words = [f"word {index}" for index in range(5000)]
    repeated = form(regex="(((a{1,200}){1,200}){1,200}){1,200}")
    left, many, much = answers(grammars, form(grammar='start: start "a" | "b"'), form(json={"enum": words}), repeated)
    assert isinstance(left, GrammarMatcher) and isinstance(many, GrammarMatcher) and isinstance(much, GrammarMatcher)
    assert re.fullmatch("ba*", random_text(left, tokenizer, random.Random(1)) or "ba")
    assert json.loads(random_text(many, tokenizer, random.Random(1))) in words


@pytest.mark.parametrize(("seconds", "memory", "words"), [(1e-4, 256 << 20, "0.0001 s"), (5.0, 1 << 20, "1 MiB")])
def test_the_judges_limits(tokenizer, seconds, memory, words):
    judge = Judge(tokenizer.to_json(), VOCAB_SIZE, [EOS_ID], seconds, memory)
    for _ in range(2):  # the helper lives on
        source = grammar_source(form(json={"enum": [f"word {index}" for index in range(15_000)]}))
        refusal = judge.refusal(source)
        assert refusal is not None and "cannot be compiled within" in refusal and words in refusal
    judge.close()


def test_a_judge_that_dies_is_started_anew(grammars):
    assert isinstance(answers(grammars, form(regex="a"))[0], GrammarMatcher)
    judge = grammars._compiler._loaded[1]
    os.kill(judge.pid, 9)
    assert isinstance(answers(grammars, form(regex="b"))[0], GrammarMatcher)


def test_a_judge_that_does_not_run_is_ended(tokenizer, monkeypatch):
    judge = Judge(tokenizer.to_json(), VOCAB_SIZE, [EOS_ID])
    source = grammar_source(form(regex="a"))
    assert judge.refusal(source) is None
    stopped = judge.pid
    monkeypatch.setattr("flashserve.engine.grammar.judge._ANSWER_S", 0.2)
    os.kill(stopped, signal.SIGSTOP)
    assert judge._answer(source) == b""
    monkeypatch.setattr("flashserve.engine.grammar.judge._ANSWER_S", 30.0)
    assert judge.refusal(source) is None
    assert judge.pid != stopped
    judge.close()


def test_requests_for_the_same_share_a_compilation(grammars):
    wanted = form(json=PLACE)
    assert grammars.find(wanted) is None
    first, second = answers(grammars, wanted, wanted)
    assert isinstance(first, GrammarMatcher) and isinstance(second, GrammarMatcher)
    assert first.take(first_allowed(first))
    assert second.mask() == grammars.find(wanted).mask(), "each goes on by itself"


def test_grammars_that_wait_are_bounded(grammars, monkeypatch):
    monkeypatch.setattr(service, "MAX_WAITING", 1)
    first, second = answers(grammars, form(regex="a"), form(regex="b"))
    assert isinstance(first, GrammarMatcher)
    assert isinstance(second, ErrorInfo) and second.code == UNAVAILABLE and second.retry_after_ms


def test_a_fault_of_the_library_ends_one_sequence(llm, monkeypatch):
    broken = SimpleNamespace(is_stopped=lambda: False)  # and nothing else
    monkeypatch.setattr(Grammars, "find", lambda *_: GrammarMatcher(broken, EOS_ID))
    with pytest.raises(InvalidArgument, match="no token was left to choose"):
        llm.generate("x", {"structured_outputs": {"regex": "a"}, "max_tokens": 5})
    assert llm.generate("x", {"max_tokens": 2, "ignore_eos": True})[0].finish_reason == "length"


def first_allowed(matcher: GrammarMatcher) -> int:
    bits = int.from_bytes(matcher.mask(), "little")
    return (bits & -bits).bit_length() - 1


# --- engines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, dtype="float32", num_threads=1, max_num_seqs=8) as engine:
        yield engine


def test_different_grammars_in_one_batch_beside_unconstrained_requests(llm):
    free = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    alone = llm.generate("x", free)[0].token_ids
    wanted = [{"json": PLACE}, {"regex": "[a-c]{4,9}"}, {"choice": ["yes", "no"]}, {"grammar": 'start: "a" /b{2,3}/'}]
    params = [{"temperature": 1, "max_tokens": 200, "seed": i, "structured_outputs": w} for i, w in enumerate(wanted)]
    results = llm.generate(["x"] * 6, [free, *params, free])
    assert results[0].token_ids == results[5].token_ids == alone
    assert [result.finish_reason for result in results[1:5]] == ["stop"] * 4
    jsonschema.validate(json.loads(results[1].text), PLACE)
    assert re.fullmatch("[a-c]{4,9}", results[2].text)
    assert results[3].text in ("yes", "no")
    assert results[4].text in ("abb", "abbb")
    assert llm.stats().free_blocks == llm.stats().total_blocks


@pytest.mark.parametrize("schema", [PLACE, {"type": "array", "items": {"type": "string"}, "minItems": 3}])
def test_a_text_is_closed_when_max_tokens_is_near(schema, llm):
    """Samples of one prompt end each in its time, beside one that is free."""
    free = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    alone = llm.generate("x", free)[0].token_ids
    wanted = {"json": schema, "close_json": True}
    params = [
        {"temperature": 1, "seed": s, "n": 3, "max_tokens": s, "structured_outputs": wanted} for s in (45, 60, 90)
    ]
    *results, neighbour = llm.generate(["x"] * 4, [*params, free])
    for result, most in zip(results, [45] * 3 + [60] * 3 + [90] * 3, strict=True):
        jsonschema.validate(json.loads(result.text), schema)
        assert len(result.token_ids) <= most
    assert "length" in {result.finish_reason for result in results}
    assert neighbour.token_ids == alone
    assert llm.stats().free_blocks == llm.stats().total_blocks


def test_no_room_to_close_a_text_is_refused(llm):
    wanted = {"structured_outputs": {"json": PLACE, "close_json": True}}
    for _ in range(2):  # while it is compiled, and afterwards
        with pytest.raises(
            InvalidArgument, match=r"close_json: the shortest text found of this form takes \d+ tokens, of 3"
        ):
            llm.generate("x", {**wanted, "max_tokens": 3})
    assert llm.stats().free_blocks == llm.stats().total_blocks and llm.stats().running == 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_samples_of_one_prompt(llm, temperature):
    params = {"temperature": temperature, "n": 3, "seed": 1, "max_tokens": 200, "structured_outputs": {"json": PLACE}}
    results = llm.generate("x", params)
    assert [result.finish_reason for result in results] == ["stop"] * 3
    for result in results:
        jsonschema.validate(json.loads(result.text), PLACE)
    assert len({result.text for result in results}) == (3 if temperature else 1)


def test_params_built_by_hand(llm):
    wanted = StructuredOutputs("regex", "[0-9]{3}")
    assert re.fullmatch(r"\d{3}", llm.generate("x", SamplingParams(max_tokens=9, structured_outputs=wanted))[0].text)


def test_a_refused_grammar_is_an_error_and_leaves_nothing_behind(llm):
    with pytest.raises(InvalidArgument, match=r"structured_outputs: the regular expression is refused: "):
        llm.generate(["x", "y"], [{"structured_outputs": {"regex": "("}}, {"max_tokens": 3}])
    assert llm.stats().free_blocks == llm.stats().total_blocks
    assert llm.generate("x", {"max_tokens": 2, "ignore_eos": True})[0].finish_reason == "length"


def test_min_tokens_delay_the_end_of_a_grammar_that_may_go_on(llm):
    params = {"structured_outputs": {"regex": "a*"}, "min_tokens": 5, "max_tokens": 50}
    assert re.fullmatch("a{5,}", llm.generate("x", params)[0].text)


def test_allowed_tokens(llm):
    allowed = llm.tokenizer.encode("abc")
    result = llm.generate("x", {"allowed_token_ids": allowed, "max_tokens": 30, "temperature": 1})[0]
    assert result.finish_reason == "length"
    assert set(result.token_ids) <= set(allowed)
    assert len(set(result.token_ids)) > 1
    with pytest.raises(InvalidArgument, match="allowed_token_ids: token id 512 is not in the model's range"):
        llm.generate("x", {"allowed_token_ids": [512]})


@pytest.mark.parametrize("seed", range(2))
def test_one_step_ahead_of_a_late_device(folder, seed, tokenizer):
    """With preemption and an abort among them; unconstrained ones are as if alone."""
    device = LazyCpu(seed)
    engine = Engine(
        load(folder, device, max_num_seqs=5, max_num_batched_tokens=32, max_model_len=64, num_gpu_blocks_override=5),
        max_tokens=40,
    )
    free = Engine(load(folder, max_num_seqs=2, max_model_len=64), max_tokens=40)
    free.add(0, range(3, 20))
    free.finish()
    engine.add(0, range(3, 20))
    for index in range(1, 6):
        regex = f"[a-f]{{{5 * index}}}(,[0-9]{{3,5}}){{1,2}}"
        engine.add(
            index, range(3, 9), temperature=1.0, seed=index, structured_outputs=StructuredOutputs("regex", regex)
        )
    for _ in range(8):
        engine.step()
    engine.core.handle(Abort([5]))
    engine.finish()
    assert engine.tokens[0] == free.tokens[0]
    for index in range(1, 5):
        text = tokenizer.decode([token for token in engine.tokens[index] if token != EOS_ID])
        assert re.fullmatch(f"[a-f]{{{5 * index}}}(,[0-9]{{3,5}}){{1,2}}", text), text
    stats = engine.core.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    assert stats.preemptions > 0
    for each in (engine, free):
        each.core.close()
