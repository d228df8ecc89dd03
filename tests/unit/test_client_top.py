"""`flashserve top`: what it makes of two looks at a server's metrics."""

import math
import subprocess
import sys

import pytest
from rich.console import Console

from flashserve_client.top import Change, Watch, parse, row, table

LABELS = 'model="m",model_name="m",version="1",engine="{engine}"'


def metrics(engine="0", **values):
    """The text of /metrics: gauges and counters by name, and the first token's buckets as ``le_…``."""
    labels = LABELS.format(engine=engine)
    names = {"ready": "flashserve:engine_ready", "running": "vllm:num_requests_running",
             "kv": "vllm:kv_cache_usage_perc", "tokens": "vllm:generation_tokens_total",
             "hits": "vllm:prefix_cache_hits_total", "asked": "vllm:prefix_cache_queries_total",
             "errors": 'flashserve:request_errors_total'}  # fmt: skip
    lines = [f"{names[key]}{{{labels}}} {value}" for key, value in values.items() if key in names]
    buckets = {key[3:].replace("_", "."): value for key, value in values.items() if key.startswith("le_")}
    if buckets:
        lines.append("# TYPE vllm:time_to_first_token_seconds histogram")
        lines += [f'vllm:time_to_first_token_seconds_bucket{{{labels},le="{le}"}} {n}' for le, n in buckets.items()]
    return "\n".join(lines) + "\n"


def change(before, now, seconds=2.0):
    return Change("m", parse(before, 100.0), parse(now, 100.0 + seconds))


def test_rates_are_those_of_the_window():
    seen = change(metrics(ready=1, tokens=100), metrics(ready=1, tokens=300))
    assert seen.rate("vllm:generation_tokens_total") == 100
    assert math.isnan(change(metrics(ready=1), metrics(ready=1), seconds=0).rate("vllm:generation_tokens_total"))


def test_a_counter_that_fell_began_anew():
    assert change(metrics(tokens=1000), metrics(tokens=30)).gained("vllm:generation_tokens_total") == 30


def test_quantiles_are_those_of_the_values_in_between():
    before = metrics(le_0_1=50, le_0_2=50, le_Inf=50)
    seen = change(before, metrics(le_0_1=50, le_0_2=150, le_Inf=150))
    assert seen.quantile("vllm:time_to_first_token_seconds", 0.5) == pytest.approx(0.15)
    assert seen.quantile("vllm:time_to_first_token_seconds", 0.99) == pytest.approx(0.199)
    assert math.isnan(change(before, before).quantile("vllm:time_to_first_token_seconds", 0.5))


def test_what_lies_beyond_the_last_bound_is_shown_as_it():
    seen = change(metrics(le_0_1=0, le_0_2=0, le_Inf=0), metrics(le_0_1=0, le_0_2=0, le_Inf=9))
    assert seen.quantile("vllm:time_to_first_token_seconds", 0.5) == 0.2


def test_instances_are_added_up_and_their_memory_is_averaged():
    both = metrics("0", ready=1, running=3, kv=0.5) + metrics("1", ready=0, running=4, kv=0.1)
    cells = row(change(both, both))
    assert cells[:3] == ["m", "[red]1 of 2[/red]", "7"]
    assert cells[4] == "30%"


def shown(what):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_a_table_has_a_line_for_each_model_and_says_when_there_is_none():
    snapshot = parse(metrics(ready=1, hits=3, asked=4, errors=2), 1.0)
    empty = parse("", 0.0)
    line = shown(table(empty, snapshot, "here", 200)).splitlines()[-2].split()
    assert (line[0], line[1], line[-2], line[-1]) == ("m", "1", "75%", "2")
    assert "no model that reports metrics" in shown(table(empty, empty, "here", 200))


def test_a_narrow_terminal_gets_a_column_for_each_model():
    snapshot = parse(metrics(ready=1, running=3, hits=3, asked=4), 1.0)
    lines = [line.split() for line in shown(table(parse("", 0.0), snapshot, "here", 80)).splitlines()]
    assert ["model", "m"] in lines
    assert ["run", "3"] in lines
    assert ["cached", "75%"] in lines


def test_the_window_forgets_what_is_older(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("flashserve_client.top.time.monotonic", lambda: next(clock))

    class Http:
        def get(self, url):
            return self

        text = metrics(ready=1)

        def raise_for_status(self):
            return None

    watch = Watch("u", window_s=3)
    for _ in range(10):
        watch.look(Http())
    assert [snapshot.time_s for snapshot in watch._seen] == [6, 7, 8, 9]


def test_without_a_server_it_says_so_and_ends():
    command = [sys.executable, "-m", "flashserve.cli", "top", "--once", "--url", "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no metrics at http://127.0.0.1:9/metrics" in done.stderr
    assert "Traceback" not in done.stderr
