"""What a load test sends and when: lengths, arrivals, prompts, traces, options."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.arrivals import Spacing, parse_rate, parse_spacing, plan_arrivals
from loadtest.lengths import parse_length
from loadtest.record import Record
from loadtest.search import Trial, best_of, find_rate, parse_range
from loadtest.settings import Settings, add_options, settings_from
from loadtest.streams import parse_target
from loadtest.traces import read_trace
from loadtest.workload import Conversation, Prefixes, Trouble, Workload


def plan(rate: str, spacing: str, duration: float = 200.0, seed: int = 1) -> list[float]:
    return list(plan_arrivals(parse_rate(rate), parse_spacing(spacing), seed, duration))


def settings(*words: str, targets: tuple[str, ...] = ("grpc://localhost",)) -> Settings:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    return settings_from(parser.parse_args(words), list(targets))


@pytest.mark.parametrize(("kind", "variation"), [("poisson", 1.0), ("constant", 0.0), ("gamma:0.25", 2.0)])
def test_arrivals_keep_their_rate_and_their_burstiness(kind: str, variation: float) -> None:
    times = plan("50", kind)
    assert len(times) == pytest.approx(50 * 200, rel=0.06)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, abs=0.1)


def test_constant_arrivals_begin_at_once_and_never_drift() -> None:
    assert plan("4", "constant", 1.0) == [0.0, 0.25, 0.5, 0.75]


def test_a_ramp_and_a_spike_have_their_rates_in_each_part() -> None:
    times = plan("0-100@20,10@10,200@1,10@10", "poisson", math.inf)
    counts = [sum(start <= time_s < end for time_s in times) for start, end in ((0, 10), (10, 20), (20, 30), (30, 31))]
    for count, expected in zip(counts, (250, 750, 100, 200), strict=True):
        assert abs(count - expected) < 4 * math.sqrt(expected)
    assert times == sorted(times)
    assert times[-1] <= 41


def test_a_falling_ramp_to_zero_ends() -> None:
    assert plan("10-0@10", "constant", math.inf)[-1] <= 10


def test_the_same_seed_gives_the_same_times() -> None:
    assert plan("5", "poisson") == plan("5", "poisson") != plan("5", "poisson", seed=2)


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "5-10", "5@0", "5,6@3", "1e9", "nan", "5@x", "0@10"])
def test_a_rate_that_is_none_says_what_one_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"rate|must be|lasts"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["normal", "gamma", "gamma:0", "gamma:x", "poisson:2"])
def test_a_spacing_that_is_none_says_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match="poisson, constant or gamma"):
        parse_spacing(text)


def test_lengths_are_drawn_from_their_distribution() -> None:
    import random

    rng = random.Random(1)
    assert {parse_length("7").draw(rng) for _ in range(5)} == {7}
    assert {parse_length("uniform:2-4").draw(rng) for _ in range(200)} == {2, 3, 4}
    drawn = [parse_length("lognormal:100,0.5,300").draw(rng) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(100, rel=0.05)
    assert max(drawn) == 300


@pytest.mark.parametrize(
    "text", ["", "0", "x", "uniform:5", "uniform:5-2", "lognormal:5", "lognormal:0,1", "1e3", "-4"]
)
def test_a_length_that_is_none_says_what_one_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|lengths go|median"):
        parse_length(text)


def workload(**values: object) -> Workload:
    made = Workload(parse_length("50"), parse_length("uniform:5-9"), seed=3, chars_per_token=4.0)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_prompts_differ_from_their_first_characters_on_and_repeat_with_the_number() -> None:
    prompts = [workload().ask(number).prompt for number in range(300)]
    assert len({prompt[:6] for prompt in prompts}) == 300
    assert {len(prompt) for prompt in prompts} == {200}
    assert workload().ask(17) == workload().ask(17)
    assert {workload().ask(number).max_tokens for number in range(100)} == {5, 6, 7, 8, 9}


def test_shared_prefixes_share() -> None:
    shared = workload(prefixes=Prefixes(tokens=30, share=0.5, groups=2))
    beginnings = [shared.ask(number).prompt[:120] for number in range(400)]
    counts = sorted((beginnings.count(text) for text in set(beginnings)), reverse=True)
    assert counts[0] + counts[1] == pytest.approx(200, abs=45)
    assert counts[2] == 1
    assert len({shared.ask(number).prompt for number in range(400)}) == 400


def test_a_conversation_grows_until_its_last_turn_or_an_error() -> None:
    talk = Conversation()
    talk.begin(3)
    for turn in range(3):
        asked = workload(prefixes=Prefixes(tokens=30, share=1.0)).ask(turn, history=talk.history)
        assert asked.text.endswith(asked.prompt) and len(asked.messages) == 2 * turn + 1
        assert asked.text.startswith("".join(map("".join, talk.history)))
        assert talk.turns_left == 3 - turn
        talk.add(asked.prompt, Record("openai", 0.0, texts=[" answer", f" {turn}. "]))
    assert not talk.turns_left
    # The shared text is at its beginning only.
    assert len({prompt[:120] for prompt, _ in talk.history}) == 3
    talk.begin(3)
    assert talk.history == ()
    talk.add("hello", Record("openai", 0.0, texts=["hal"], error="timeout"))
    assert not talk.turns_left


def test_turns_are_drawn_for_each_conversation() -> None:
    talks = workload(turns=parse_length("uniform:2-4"))
    assert {talks.new_turns(number) for number in range(50)} == {2, 3, 4}
    assert settings("--turns", "3", "--think-time", "1.5").workload.think_s == 1.5


def test_some_clients_leave_and_some_have_no_patience() -> None:
    asks = [workload(trouble=Trouble(0.2, 4, 0.1, 0.5)).ask(number) for number in range(2000)]
    assert sum(ask.cancel_after_tokens == 4 for ask in asks) == pytest.approx(400, abs=70)
    assert sum(ask.impatient and ask.timeout_s == 0.5 for ask in asks) == pytest.approx(200, abs=50)


def test_an_azure_trace_is_read(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48,10,2\n"
    )
    trace = read_trace(str(file)).faster(2.0)
    assert [(request.prompt_tokens, request.output_tokens) for request in trace.requests] == [(374, 44), (10, 2)]
    assert [request.at_s for request in trace.requests] == pytest.approx([0, 1.31941 / 2], abs=1e-5)


def test_a_mooncake_trace_gives_equal_text_for_equal_blocks(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.jsonl"
    file.write_text(
        '{"timestamp": 3000, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]}\n'
        '{"timestamp": 4500, "input_length": 1100, "output_length": 6, "hash_ids": [1, 2, 3]}\n'
        '{"timestamp": 4500, "input_length": 600, "output_length": 6, "hash_ids": [4, 2]}\n'
    )
    requests = read_trace(str(file)).requests
    assert [request.at_s for request in requests] == [0, 1.5, 1.5]
    first, second, third = (
        workload().ask(number, request.prompt_tokens, request.output_tokens, request.blocks).prompt
        for number, request in enumerate(requests)
    )
    assert second.startswith(first)
    assert first[:2000] != third[:2000]
    assert first[2048:2400] == third[2048:2400]
    assert len(first) == 4000


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n", '{"a": 1}\n', "{]"]
)
def test_a_file_that_is_no_trace_says_where_it_fails(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"line|columns|holds no request"):
        read_trace(str(file))


@pytest.mark.parametrize(
    ("text", "protocol"),
    [("grpc://h", "triton-grpc"), ("http://h:8000", "triton-http"), ("http://h:8000/", "triton-http"),
     ("http://h/v1", "openai"), ("https://h/v1/completions", "openai"), ("grpc://h:1*2.5", "triton-grpc")],
)  # fmt: skip
def test_a_targets_url_says_its_protocol(text: str, protocol: str) -> None:
    assert parse_target(text).protocol == protocol
    assert parse_target(text).weight == (2.5 if "*" in text else 1)


@pytest.mark.parametrize("text", ["", "h:8000", "ftp://h", "http://", "grpc://h*0", "grpc://h*x", "http://h:99999"])
def test_a_target_that_is_none_says_what_one_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|not URL"):
        parse_target(text)


def test_the_measured_time_comes_from_the_course_where_there_is_one() -> None:
    assert settings().schedule.duration_s == 60
    assert settings("--rate", "5").schedule.duration_s == 60
    assert settings("--rate", "5@30,10@20", "--warmup", "10").schedule.duration_s == 40
    assert settings("--rate", "5", "--duration", "7").schedule.duration_s == 7


@pytest.mark.parametrize(
    "words",
    ["--arrivals constant", "--trace-speed 2", "--shared-share 0.5", "--prefix-groups 3", "--cancel-after 3",
     "--short-timeout 2", "--think-time 2", "--turns 2 --rate 5",
     "--rate 5@10 --duration 11", "--rate 5@10 --warmup 10", "--metrics-url x"],
)  # fmt: skip
def test_an_option_that_would_have_no_effect_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"needs|longer|leaves|must be|exclude"):
        settings(*words.split())


@pytest.mark.parametrize("words", ["--rate x", "--duration -1", "--trace /nowhere", "--cancel-share 2", "--param a"])
def test_a_wrong_value_is_refused_by_its_option(words: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=words.split()[0]):
        settings(*words.split())


def test_answers_have_their_exact_length_unless_the_model_may_end_them() -> None:
    assert settings().workload.params == {"ignore_eos": True}
    assert settings("--respect-eos", "--param", "top_p=0.5").workload.params == {"top_p": 0.5}


@pytest.mark.parametrize(("capacity", "high"), [(9.7, 100), (1.0, 50), (73.0, 1000)])
def test_the_search_ends_within_5_percent_below_what_the_server_holds(capacity: float, high: float) -> None:
    trials = find_rate(lambda rate: Trial(rate, ("too much",) if rate > capacity else ()), 1.0, high)
    best = best_of(trials)
    assert best is not None
    assert capacity / 1.05 <= best <= capacity
    assert len(trials) <= 14


def test_the_search_says_when_nothing_or_all_is_held() -> None:
    assert best_of(find_rate(lambda rate: Trial(rate, ("late",)), 1.0, 9.0)) is None
    assert best_of(find_rate(lambda rate: Trial(rate, ()), 1.0, 9.0)) == 9.0


@pytest.mark.parametrize("text", ["", "5", "5-2", "0-3", "a-b", "1-1e9"])
def test_a_range_that_is_none_says_what_one_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"LOW-HIGH|must go"):
        parse_range(text)


def test_the_command_lists_its_options_without_locust() -> None:
    program = """
import sys
from flashserve.cli import build_parser
build_parser()
brought = {"locust", "gevent", "matplotlib", "rich", "grpc", "httpx", "numpy"} & set(sys.modules)
sys.exit(f"brought {brought}" if brought else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_spacing_of_a_gamma_shape_of_one_is_poissons() -> None:
    assert parse_spacing("gamma:1") == parse_spacing("poisson") == Spacing()
