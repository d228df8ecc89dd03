"""Triton's /metrics: every promised name is there, and its values are what clients have sent and received."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

import pytest

from flashserve_client import AsyncClient, Unavailable
from harness import HTTP, Server, wait_until
from requests_helper import ASK_FOR_ALL, GrpcCall, call, generate, post, stream_sse, wait_idle

MODEL, BLOCKS, BLOCK_SIZE = "counted", 20, 16
PROMPT = [40] * 40
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
COUNTERS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "flashserve:prefill_chunks_total",
    "flashserve:engine_steps_total",
    "flashserve:engine_restarts_total",
    *(f"vllm:request_success_total{{{reason}}}" for reason in ("stop", "length")),
    *(f"flashserve:requests_cancelled_total{{{reason}}}" for reason in ("client", "deadline", "shutdown")),
    *(f"flashserve:request_errors_total{{{code}}}" for code in ("INVALID_ARG", "UNAVAILABLE", "INTERNAL")),
)
HISTOGRAMS = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_n",
)


def lines(server: Server, model: str = MODEL) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each of a model's series."""
    found = []
    for name, labels, value in re.findall(
        r"^([a-z0-9_:]+)\{(.*)\} (\S+)$", HTTP.get(server.metrics).text, re.MULTILINE
    ):
        parsed = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if parsed.get("model_name") == model:
            found.append((name, parsed, float(value)))
    return found


def read(server: Server, model: str = MODEL) -> dict[str, float]:
    """Values by name, with the value of a further label behind it: ``name{length}``, ``name_bucket{0.1}``."""
    values = {}
    for name, labels, value in lines(server, model):
        extra = [labels[key] for key in ("finished_reason", "reason", "code", "le") if key in labels]
        values[f"{name}{{{extra[0]}}}" if extra else name] = value
    return values


def settled(server: Server) -> dict[str, float]:
    """All values, once what came before is in them."""
    wait_idle(server, MODEL)
    marker = "flashserve:request_errors_total{INVALID_ARG}"
    seen = read(server)[marker]
    assert post(server, {"text_input": "x", "temperature": -1}, model=MODEL).status_code == 400
    assert wait_until(lambda: read(server)[marker] > seen, 5)
    values: list[dict[str, float]] = [{}, read(server)]
    assert wait_until(lambda: values.append(read(server)) or values[-1] == values[-2], 5)
    return values[-1]


def gains(server: Server, before: Mapping[str, float], expected: Mapping[str, float]) -> dict[str, float]:
    """What all series gained, once those in ``expected`` gained as much: they come up to a second late."""

    def gained() -> dict[str, float]:
        return {name: value - before[name] for name, value in read(server).items()}

    wait_until(lambda: expected.items() <= gained().items(), 5)
    result = gained()
    assert {name: result[name] for name in expected} == dict(expected)
    return result


def new_salt() -> str:
    """Keeps a test's prompts apart from what others have left in the prefix cache."""
    return uuid.uuid4().hex


# --- what is there -----------------------------------------------------------------------------------------


def test_every_promised_name_is_there_before_the_first_request(server: Server) -> None:
    values = read(server)
    for name in (*GAUGES, *COUNTERS, "flashserve:engine_ready", "vllm:lora_requests_info"):
        assert name in values
    for name in HISTOGRAMS:
        assert {f"{name}_count", f"{name}_sum", f"{name}_bucket{{+Inf}}"} <= values.keys()


def test_every_series_says_which_model_it_is_of(server: Server) -> None:
    for model in (MODEL, "llama"):
        found = lines(server, model)
        assert len(found) > 100
        assert {(labels["model"], labels["version"], labels["model_name"]) for _, labels, _ in found if
                "model" in labels and "version" in labels} == {(model, "1", model)}  # fmt: skip


def test_the_caches_shape(server: Server) -> None:
    (labels,) = [labels for name, labels, _ in lines(server) if name == "vllm:cache_config_info"]
    assert (labels["block_size"], labels["num_gpu_blocks"]) == (str(BLOCK_SIZE), str(BLOCKS))


# --- counts ------------------------------------------------------------------------------------------------


def test_requests_and_tokens_are_counted_once(server: Server) -> None:
    """Three equal prompts of 40 tokens, the last two of which find 32 of them in the cache."""
    before = settled(server)
    ask = {"model": MODEL, "prompt_token_ids": json.dumps(PROMPT), "cache_salt": new_salt()}
    for limit in (1, 10):
        generate(server, **ask, max_tokens=limit)
    events = stream_sse(server, **ask, stop_token_ids="[84]", **ASK_FOR_ALL)  # position 44: the fifth token
    assert sum(event["num_output_tokens"] for event in events) == 5
    expected = {
        "vllm:prompt_tokens_total": 120,
        "vllm:generation_tokens_total": 16,
        "vllm:prefix_cache_queries_total": 120,
        "vllm:prefix_cache_hits_total": 64,
        "vllm:request_success_total{length}": 2,
        "vllm:request_success_total{stop}": 1,
        "flashserve:engine_steps_total": 16,
        "vllm:request_prompt_tokens_count": 3,
        "vllm:request_prompt_tokens_sum": 120,
        "vllm:request_generation_tokens_sum": 16,
        "vllm:inter_token_latency_seconds_count": 13,
        "vllm:time_to_first_token_seconds_count": 3,
        "vllm:time_per_output_token_seconds_count": 13,
        "vllm:request_time_per_output_token_seconds_count": 2,  # a single token has no time per token after the first
        "vllm:e2e_request_latency_seconds_count": 3,
        "vllm:request_queue_time_seconds_count": 3,
        "vllm:request_prefill_time_seconds_count": 3,
        "vllm:request_decode_time_seconds_count": 3,
        "vllm:request_params_n_sum": 3,
    }
    gained = gains(server, before, expected)
    for name in COUNTERS:
        assert name in expected or gained[name] == 0


def test_a_stop_string_counts_what_was_sent(server: Server) -> None:
    before = settled(server)
    ask = {"prompt_token_ids": json.dumps(PROMPT), "stop": "qrs", "cache_salt": new_salt()}
    generate(server, model=MODEL, **ask)  # the null device begins with "n"
    gains(server, before, {"vllm:request_success_total{stop}": 1, "vllm:request_generation_tokens_sum": 6})
    wait_idle(server, MODEL)


def test_chunks_of_long_prompts_are_counted(server: Server) -> None:
    before = settled(server)
    call(server, model=MODEL, sampling_parameters={"prompt_token_ids": [40] * 250, "max_tokens": 1,
                                                   "cache_salt": new_salt()})  # fmt: skip
    expected = {"flashserve:prefill_chunks_total": 1, "flashserve:engine_steps_total": 2}  # 128 + 122 tokens
    gains(server, before, {**expected, "vllm:prompt_tokens_total": 250})


async def test_preemptions_are_counted(server: Server) -> None:
    """Four requests fill all blocks with their prompts; then each needs more."""
    before = settled(server)
    async with AsyncClient(f"grpc://{server.grpc}", model=MODEL) as client:
        results = await asyncio.gather(
            *(client.generate([40] * 79, max_tokens=100, ignore_eos=True, cache_salt=new_salt()) for _ in range(4))
        )
    preemptions = [result.timings.preemptions for result in results]
    assert sum(filter(None, preemptions)) > 0
    gains(
        server,
        before,
        {
            "vllm:num_preemptions_total": sum(filter(None, preemptions)),
            "vllm:prompt_tokens_total": 4 * 79,  # recomputed ones do not count again
            "vllm:generation_tokens_total": 400,
            "vllm:request_success_total{length}": 4,
        },
    )


async def test_what_does_not_end_well_is_counted_by_its_reason(server: Server) -> None:
    before = settled(server)
    endless = {"prompt_token_ids": PROMPT, "max_tokens": 200, "ignore_eos": True}
    for _ in range(2):
        assert post(server, {"text_input": "x", "temperature": -1}, model=MODEL).status_code == 400
    call(server, model=MODEL, sampling_parameters={**endless, "timeout_ms": 30})
    gone = GrpcCall(server, {"sampling_parameters": endless, "stream": True}, model=MODEL)
    next(gone)
    gone.cancel()
    wait_idle(server, MODEL)
    async with AsyncClient(f"grpc://{server.grpc}", model=MODEL) as client:  # four run, four wait
        crowd = (client.generate([40] * 40, max_tokens=50, cache_salt=new_salt(), ignore_eos=True) for _ in range(16))
        results = await asyncio.gather(*crowd, return_exceptions=True)
    refusals = sum(isinstance(result, Unavailable) for result in results)
    assert 1 <= refusals <= 12
    expected = {
        "flashserve:request_errors_total{INVALID_ARG}": 2,
        "flashserve:requests_cancelled_total{deadline}": 1,
        "flashserve:requests_cancelled_total{client}": 1,
        "flashserve:request_errors_total{UNAVAILABLE}": refusals,
        "vllm:request_success_total{length}": 16 - refusals,
    }
    gains(server, before, expected)


# --- times -------------------------------------------------------------------------------------------------


def test_times_are_those_that_the_client_is_told(server: Server) -> None:
    before = settled(server)
    started = time.monotonic()
    ask = {"prompt_token_ids": json.dumps(PROMPT), "max_tokens": 30, "ignore_eos": True, **ASK_FOR_ALL}
    told = [json.loads(generate(server, model=MODEL, **ask)["request_metrics"]) for _ in range(3)]
    elapsed = time.monotonic() - started
    gained = gains(server, before, {"vllm:e2e_request_latency_seconds_count": 3})

    def seconds(key: str) -> Any:
        return pytest.approx(sum(one[key] for one in told) / 1000, abs=1e-5)

    assert gained["vllm:time_to_first_token_seconds_sum"] == seconds("ttft_ms")
    assert gained["vllm:request_queue_time_seconds_sum"] == seconds("queue_ms")
    assert gained["vllm:request_prefill_time_seconds_sum"] == seconds("prefill_ms")
    assert gained["vllm:request_decode_time_seconds_sum"] == seconds("decode_ms")
    parts = ("queue_time", "prefill_time", "decode_time")
    whole = gained["vllm:e2e_request_latency_seconds_sum"]
    assert whole == pytest.approx(sum(gained[f"vllm:request_{part}_seconds_sum"] for part in parts), abs=1e-5)
    assert 3 * 30 * 0.001 < whole < elapsed, "each of 30 steps takes at least 1 ms"
    decode = gained["vllm:request_decode_time_seconds_sum"]
    assert gained["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(decode / 29, rel=1e-3)
    assert gained["vllm:inter_token_latency_seconds_sum"] <= decode + 1e-3
    assert gained["vllm:time_per_output_token_seconds_sum"] == gained["vllm:inter_token_latency_seconds_sum"]


def test_a_histogram_is_one_family_with_its_buckets_in_order(server: Server) -> None:
    text = HTTP.get(server.metrics).text
    for name in HISTOGRAMS:
        assert re.findall(rf"^# TYPE ({name}\S*) (\w+)$", text, re.MULTILINE) == [(name, "histogram")]
        bounds = re.findall(rf'^{name}_bucket{{.*model_name="{MODEL}".*le="(.*?)".*}}', text, re.MULTILINE)
        assert [float(bound) for bound in bounds] == sorted(map(float, bounds))
        assert bounds[-1] == "+Inf"


def test_histograms_are_cumulative_and_hold_each_value_in_its_bucket(server: Server) -> None:
    before = settled(server)
    generate(server, model=MODEL, prompt_token_ids=json.dumps(PROMPT), max_tokens=7)
    gained = gains(server, before, {"vllm:request_prompt_tokens_count": 1, "vllm:request_generation_tokens_count": 1})
    for name, value in (("vllm:request_prompt_tokens", 40), ("vllm:request_generation_tokens", 7)):
        for bound in (1, 2, 5, 10, 20, 50, 100, 1000, 100_000):
            assert gained[f"{name}_bucket{{{bound}}}"] == (value <= bound)
    values = read(server)
    for name in HISTOGRAMS:
        buckets = [(float(key.rpartition("{")[2][:-1]), value) for key, value in values.items() if
                   key.startswith(f"{name}_bucket")]  # fmt: skip
        counts = [count for _, count in sorted(buckets)]
        assert counts == sorted(counts)
        assert counts[-1] == values[f"{name}_count"]


# --- gauges ------------------------------------------------------------------------------------------------


def test_gauges_follow_the_engine_and_return_to_zero(server: Server) -> None:
    """`narrow` runs one request; two others wait."""
    total = next(int(lb["num_gpu_blocks"]) for n, lb, _ in lines(server, "narrow") if n == "vllm:cache_config_info")
    endless = {"prompt_token_ids": [40] * 160, "max_tokens": 800, "ignore_eos": True}
    calls = [GrpcCall(server, {"sampling_parameters": endless, "stream": True}, model="narrow") for _ in range(3)]
    assert wait_until(lambda: [read(server, "narrow")[name] for name in GAUGES[:2]] == [1, 2], 5)
    used = read(server, "narrow")["vllm:kv_cache_usage_perc"] * total
    assert used == pytest.approx(round(used), abs=1e-3)
    assert 10 <= used <= 60
    for one in calls:
        one.cancel()
    wait_idle(server, "narrow")
    assert read(server, "narrow")["flashserve:engine_ready"] == 1


def test_samples_hold_their_prompts_blocks_once(server: Server) -> None:
    total = next(int(lb["num_gpu_blocks"]) for n, lb, _ in lines(server, "paced") if n == "vllm:cache_config_info")
    length, samples, tokens = 1000, 8, 400
    sampling = {"prompt_token_ids": [40] * length, "n": samples, "max_tokens": tokens, "ignore_eos": True}
    call = GrpcCall(server, {"sampling_parameters": sampling, "stream": True}, model="paced")
    shared = length // BLOCK_SIZE
    assert wait_until(lambda: read(server, "paced")["vllm:kv_cache_usage_perc"] * total > shared + samples - 0.5, 5)
    used = round(read(server, "paced")["vllm:kv_cache_usage_perc"] * total)
    most_own = (length + tokens) // BLOCK_SIZE + 1 - shared
    assert shared + samples <= used <= shared + samples * most_own < samples * shared
    call.cancel()
    wait_idle(server, "paced")
