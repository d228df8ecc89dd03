"""Load tests against a real tritonserver whose models compute nothing: what is measured is what happened."""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashserve.launcher.ports import free_port
from harness import HTTP, ROOT, SOURCES, Server
from null_models import null_model, write_null_model

pytestmark = pytest.mark.slow
# Locust runs in children only: importing it here would patch the standard library under all other tests.

STEP_S = 0.005
STALLED_S = 0.1  # twenty steps: what a load generator that is so late measures is its own machine
TOTALS = {"prompt_tokens": "vllm:prompt_tokens_total", "output_tokens": "vllm:generation_tokens_total",
          "finished": "vllm:request_success_total"}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_null_model(tmp_path_factory.mktemp("models") / "null")
    models = {
        "paced": null_model(folder, STEP_S * 1000),
        # Four places of 0.4 s for 20 tokens: ten requests per second.
        "slow": null_model(folder, 20, max_num_seqs=4, max_waiting_requests=2000),
        # Nobody else asks it: a stall of its process is nobody else's.
        "stalled": null_model(folder, STEP_S * 1000),
    }
    with Server(models) as running:
        yield running


def bench(folder: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """Runs `flashserve bench`; returns its report."""
    done = start_bench(folder, *words)
    output = done.communicate(timeout=100)[0]
    assert done.returncode == code, output
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def start_bench(folder: Path, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": ":".join([*SOURCES, str(ROOT)])}
    command = [sys.executable, "-m", "flashserve.cli", "bench", "--report", str(folder), *words]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def totals(server: Server, model: str) -> dict[str, float]:
    return {name: server.metric(metric, model_name=model) for name, metric in TOTALS.items()}


def buckets(server: Server, name: str, model: str) -> dict[float, float]:
    """How many values were at most each bound."""
    text = HTTP.get(server.metrics).text
    lines = re.findall(rf"^{name}_bucket{{(.*)}} (\S+)$", text, re.MULTILINE)
    return {float(re.search(r'le="([^"]+)"', labels)[1]): float(value)  # type: ignore[index]
            for labels, value in lines if f'model_name="{model}"' in labels}  # fmt: skip


def lag_of(report: dict[str, Any]) -> float:
    """Seconds by which the load generator was late: on a machine with other work they are in its times, and not in the
    server's."""
    return float(report["whole"]["measures"]["lateness"]["p90"] + report["generator_lag"]["p99"])


def skip_if_stalled(*reports: dict[str, Any]) -> None:
    """What is left to check are times."""
    if max(map(lag_of, reports)) > STALLED_S:
        pytest.skip("; ".join(text for report in reports for text in report["warnings"]))


def wait_settled(server: Server, model: str) -> None:
    """Until the server has passed its counters on: once a second while it is busy."""
    before: dict[str, float] = {}
    deadline = time.monotonic() + 10
    while (now := totals(server, model)) != before:
        assert time.monotonic() < deadline
        before = now
        time.sleep(1.2)


@pytest.mark.parametrize("targets", [("grpc",), ("http",), ("grpc", "http")], ids="+".join)
def test_counts_and_times_are_the_servers(loaded: Server, tmp_path: Path, targets: tuple[str, ...]) -> None:
    urls = [{"grpc": f"grpc://{loaded.grpc}", "http": loaded.http}[target] for target in targets]
    wait_settled(loaded, "paced")
    before = totals(loaded, "paced")
    names = {"ttft": "vllm:time_to_first_token_seconds", "itl": "vllm:inter_token_latency_seconds"}
    buckets_before = {name: buckets(loaded, metric, "paced") for name, metric in names.items()}
    load = ["--model", "paced", "--rate", "25", "--duration", "5", "--output-tokens", "uniform:10-30"]
    report = bench(tmp_path, *urls, *load, "--metrics-url", loaded.metrics)
    wait_settled(loaded, "paced")
    gained = {name: value - before[name] for name, value in totals(loaded, "paced").items()}

    counts = report["whole"]["counts"]
    assert counts["requests"] == counts["finished"] > 100
    assert not report["errors"]
    # One request of one token to each target comes before the load.
    assert gained["finished"] == counts["finished"] + len(targets)
    assert gained["output_tokens"] == counts["output_tokens"] + len(targets)
    assert 0 < gained["prompt_tokens"] - counts["prompt_tokens"] < 1300 * len(targets)
    assert report["server"]["requests"] <= gained["finished"]
    skip_if_stalled(report)
    own = lag_of(report)
    for name, metric in names.items():
        after = buckets(loaded, metric, "paced")
        bounds = sorted(after)
        values = [after[bound] - buckets_before[name].get(bound, 0) for bound in bounds]
        for column, share in (("p50", 0.5), ("p90", 0.9)):
            theirs = bisect.bisect_left(values, share * values[-1])
            found = report["whole"]["measures"][name][column]
            first, last = (bisect.bisect_left(bounds, value) for value in (max(found - own, 0.0), found))
            assert first - 1 <= theirs <= last + 1, (name, column, found, own, bounds[theirs])
    gap = report["phases"]["steady"]["measures"]["itl"]["p50"]
    assert gap == pytest.approx(STEP_S, rel=0.35)


def test_an_open_loop_keeps_its_rate_when_the_server_is_slow(loaded: Server, tmp_path: Path) -> None:
    load = ["--model", "slow", "--rate", "60", "--arrivals", "constant", "--duration", "10", "--output-tokens", "20"]
    report = bench(tmp_path, f"grpc://{loaded.grpc}", *load, "--drain", "0.5", "--metrics-url", "none")
    assert report["rates"]["sent requests/s"] == pytest.approx(60, rel=0.02)
    assert report["rates"]["answered requests/s"] == pytest.approx(10, rel=0.25)
    steady = report["phases"]["steady"]["measures"]
    assert steady["lateness"]["p50"] < 0.05
    # Those that waited for their first token to the end are in it: half of the requests had to, for seconds.
    assert steady["ttft"]["count"] == report["phases"]["steady"]["counts"]["requests"]
    assert steady["ttft"]["p50"] > 3
    assert any("still ran at the end" in text for text in report["warnings"])


def test_the_p99_contains_a_stall_of_the_server(loaded: Server, tmp_path: Path) -> None:
    (engine,) = [pid for stub in loaded.stubs("stalled") for pid in children(stub.pid)]
    stall_s = 1.5

    def stall() -> None:
        time.sleep(5)
        os.kill(engine, signal.SIGSTOP)
        time.sleep(stall_s)
        os.kill(engine, signal.SIGCONT)

    thread = threading.Thread(target=stall)
    thread.start()
    load = ["--model", "stalled", "--rate", "20", "--arrivals", "constant", "--duration", "8", "--output-tokens", "20"]
    try:
        report = bench(tmp_path, f"grpc://{loaded.grpc}", *load, "--metrics-url", "none")
    finally:
        thread.join()
    steady = report["phases"]["steady"]["measures"]
    # Thirty requests arrived while it stood still: nearly a quarter of all. A closed loop would have lost them.
    assert steady["ttft"]["p99"] == pytest.approx(stall_s, abs=0.2)
    assert steady["ttft"]["p90"] > 0.5
    assert steady["itl"]["max"] == pytest.approx(stall_s, abs=0.2)
    assert steady["ttft"]["p50"] < 0.1


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    found = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    return [child for child in found if b"flashserve.engine" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_two_processes_measure_what_one_does(loaded: Server, tmp_path: Path) -> None:
    load = ["--model", "paced", "--rate", "40", "--duration", "6", "--warmup", "1", "--seed", "7",
            "--prompt-tokens", "lognormal:40,0.5", "--output-tokens", "uniform:5-20", "--cancel-share", "0.1",
            "--cancel-after", "3", "--metrics-url", "none"]  # fmt: skip
    one, two = (
        bench(tmp_path / processes, f"grpc://{loaded.grpc}", *load, "--processes", processes) for processes in "12"
    )
    assert two["options"]["processes"] == 2
    for phase in ("warmup", "edge", "steady"):
        counts = [report["phases"][phase]["counts"] for report in (one, two)]
        # Whether one that means to leave does so before its answer is whole, is the server's to say.
        assert len({found.get("finished", 0) + found.get("left", 0) for found in counts}) == 1, phase
        for name in ("requests", "failed", "prompt_tokens"):
            assert counts[0].get(name, 0) == counts[1].get(name, 0), (phase, name)
    planned = [[row["planned"] for row in report["seconds"]] for report in (one, two)]
    assert planned[0] == planned[1]
    lengths = [report["histograms"]["output_tokens"]["index"] for report in (one, two)]
    assert lengths[0] == lengths[1]
    skip_if_stalled(one, two)
    for name in ("itl", "tpot", "e2e"):  # which the model paces; the first token also waits for what else runs here
        found = [report["phases"]["steady"]["measures"][name]["p50"] for report in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=0.35), name


def test_a_closed_loop_waits_for_its_answers(loaded: Server, tmp_path: Path) -> None:
    load = ["--model", "slow", "--users", "3", "--duration", "5", "--output-tokens", "20"]
    report = bench(tmp_path, loaded.http, *load, "--metrics-url", loaded.metrics)
    # 3 users, 0.4 s each, of which the first token takes one step.
    assert report["rates"]["answered requests/s"] == pytest.approx(3 / 0.41, rel=0.2)
    assert 1 <= report["server"]["peak running"] <= 3
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8  # four pictures, light and dark
    assert "http" not in re.sub(r"(grpc|http)://(localhost|127\.0\.0\.1)", "", page).replace("triton-http", "")
    assert (tmp_path / "seconds.csv").read_text().startswith("second,phase,planned,sent,")


@pytest.mark.parametrize("target", ["grpc", "http"])
def test_a_conversation_repeats_what_was_said_and_finds_it_in_the_prefix_cache(
    loaded: Server, tmp_path: Path, target: str
) -> None:
    url = {"grpc": f"grpc://{loaded.grpc}", "http": loaded.http}[target]
    words = ["--model", "paced", "--users", "2", "--duration", "5", "--turns", "3", "--think-time", "0.1"]
    wait_settled(loaded, "paced")
    hits = loaded.metric("vllm:prefix_cache_hits_total", model_name="paced")
    report = bench(tmp_path, url, *words, "--prompt-tokens", "200", "--output-tokens", "20", "--metrics-url", "none")
    wait_settled(loaded, "paced")
    hits = loaded.metric("vllm:prefix_cache_hits_total", model_name="paced") - hits
    whole = report["whole"]
    assert not report["errors"] and whole["counts"]["finished"] >= 12
    # Three turns of 200 new tokens, with the answers before them.
    lengths = whole["measures"]["prompt_tokens"]
    assert lengths["min"] == pytest.approx(200, rel=0.2)
    assert lengths["max"] > 2.5 * lengths["min"]
    # The turns have about 200, 420 and 640 tokens, of which 0, 200 and 420 were there before.
    assert hits / whole["counts"]["prompt_tokens"] > 0.3


def test_locusts_web_page_has_the_token_latencies(loaded: Server) -> None:
    port = free_port()
    env = {**os.environ, "PYTHONPATH": ":".join([*SOURCES, str(ROOT)])}
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--autostart",
               "--users", "2", "--web-host", "127.0.0.1", "--web-port", str(port), "--model", "paced", "--duration",
               "60", "--target", f"grpc://{loaded.grpc}", "--metrics-url", "none"]  # fmt: skip
    page = f"http://127.0.0.1:{port}"
    locust = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        rows: list[dict[str, float]] = []
        while sum(row["requests"] for row in rows) < 5:
            assert time.monotonic() < deadline and locust.poll() is None
            time.sleep(0.5)
            with contextlib.suppress(OSError, httpx.TransportError):  # it has not started yet
                rows = HTTP.get(f"{page}/token-latencies/data").json()
        full = max(rows, key=lambda row: row["requests"])
        assert full["ttft_p50_ms"] <= full["ttft_p90_ms"] <= full["ttft_p99_ms"]
        assert STEP_S * 500 < full["itl_p50_ms"] < STEP_S * 4000
        assert "token-latencies" in HTTP.get(page).text  # the tab
        (table,) = HTTP.get(f"{page}/stats/requests").json()["extended_stats"]
        assert table["key"] == "token-latencies" and table["data"][-1].keys() == full.keys()
        chart = HTTP.get(f"{page}/token-latencies")
        assert chart.headers["content-type"].startswith("text/html") and "<svg" in chart.text
    finally:
        locust.terminate()
        locust.wait(60)


def test_a_trace_is_replayed_and_its_equal_blocks_are_found_in_the_prefix_cache(loaded: Server, tmp_path: Path) -> None:
    rows = [{"timestamp": 100 * row, "input_length": 700, "output_length": 4, "hash_ids": [7, 1000 + row]}
            for row in range(40)]  # fmt: skip
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", "paced", "--trace", str(trace), "--trace-speed", "2", "--metrics-url", "none"]
    wait_settled(loaded, "paced")
    hits = loaded.metric("vllm:prefix_cache_hits_total", model_name="paced")
    report = bench(tmp_path, f"grpc://{loaded.grpc}", *words)
    wait_settled(loaded, "paced")
    hits = loaded.metric("vllm:prefix_cache_hits_total", model_name="paced") - hits
    whole = report["whole"]
    assert whole["counts"]["finished"] == 40
    assert whole["counts"]["output_tokens"] == 160
    assert whole["measures"]["prompt_tokens"]["p50"] == pytest.approx(700, rel=0.2)
    assert report["measured_s"] == pytest.approx(39 * 0.05, abs=0.01)
    # All but the first find the block that they share: 512 tokens of about 700.
    assert hits / whole["counts"]["prompt_tokens"] == pytest.approx(512 / 700, abs=0.12)


def test_objectives_decide_the_exit_code(loaded: Server, tmp_path: Path) -> None:
    load = [f"grpc://{loaded.grpc}", "--model", "paced", "--rate", "20", "--duration", "3", "--output-tokens", "5"]
    met = bench(tmp_path / "met", *load, "--p99-ttft", "2000", "--p99-itl", "500", "--max-error-rate", "0")
    assert not met["objectives_missed"]
    missed = bench(tmp_path / "missed", *load, "--p99-ttft", "0.5", "--p99-itl", "0.5", code=3)
    assert len(missed["objectives_missed"]) == 2
    assert missed["rates"]["goodput requests/s"] == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [(["grpc://127.0.0.1:1", "--rate", "1"], 1, "127.0.0.1:1"), (["HTTP", "--model", "nobody"], 1, "nobody"),
     (["HTTP", "--model", "paced", "--param", "top_p=7"], 1, "top_p"),
     (["HTTP", "--model", "paced", "--param", "n=2"], 2, "one sample"), (["HTTP"], 2, "(paced, slow, stalled)"),
     (["--report", "/proc/none"], 2, "/proc/none"),
     (["x"], 2, "must be grpc"),
     (["--users", "0"], 2, "whole number"), (["--users", "2", "--rate", "2"], 2, "closed loop")],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(
    loaded: Server, tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    done = start_bench(tmp_path, *[word.replace("HTTP", loaded.http) for word in words])
    output = done.communicate(timeout=60)[0]
    assert done.returncode == code, output
    assert says in output
    assert "Traceback" not in output


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_report_of_what_there_is(
    loaded: Server, tmp_path: Path, processes: str, number: signal.Signals
) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("started in a shell's background, where Ctrl-C is ignored")
    words = ["--model", "paced", "--rate", "20", "--duration", "60", "--processes", processes]
    done = start_bench(tmp_path, f"grpc://{loaded.grpc}", *words)
    assert done.stdout is not None
    seen = next(line for line in done.stdout if re.search(r" [1-9]\d* answered", line))  # it says so every 5 seconds
    done.send_signal(number)
    output = seen + done.communicate(timeout=60)[0]
    assert done.returncode == 130, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["whole"]["counts"]["finished"] > 0
    assert any("was ended after" in text for text in report["warnings"])


@pytest.mark.timeout(300)  # seven runs
def test_the_search_finds_what_the_server_holds(loaded: Server, tmp_path: Path) -> None:
    load = ["--model", "slow", "--search", "6-24", "--arrivals", "constant", "--duration", "7", "--output-tokens", "20"]
    done = start_bench(tmp_path, f"grpc://{loaded.grpc}", *load, "--p99-ttft", "400", "--metrics-url", "none")
    output = done.communicate(timeout=280)[0]
    assert done.returncode == 0, output
    # Four places, and 20 steps of 20 ms for an answer.
    found = json.loads((tmp_path / "search.json").read_text())["highest_rate"]
    assert found == pytest.approx(4 / (20 * 0.0205), rel=0.1), output
