"""`flashserve top`: every model of a server at a glance, from its metrics, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx
    from rich.console import RenderableType

DEFAULT_URL = "http://localhost:8002"
INTERRUPTED = 130
SCRAPE_TIMEOUT_S = 5.0
SILENT_S = 3.0  # beyond the slowest look at a busy server
TTFT, BETWEEN = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
READY, INSTANCES = "flashserve:engine_ready", "instances"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


def add_command(subparsers: Any) -> None:
    """Registers top."""
    top = subparsers.add_parser(
        "top",
        help="watch the models of a running server",
        description="Watch the models of a running server: requests, tokens, latencies, KV memory. Ctrl-C ends it.",
    )
    top.add_argument(
        "--url",
        default=os.environ.get("FLASHSERVE_METRICS_URL", DEFAULT_URL),
        help="the server's metrics (default: %(default)s, or $FLASHSERVE_METRICS_URL)",
    )
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="between two looks (default: 1)")
    top.add_argument("--window", type=_seconds, default=10.0, metavar="S", help="of rates and latencies (default: 10)")
    top.add_argument("--once", action="store_true", help="print one table, after one interval")
    top.set_defaults(run=run_top)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be between 0.1 and 3600 seconds")
    return value


# --- what a server says ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A server's metrics at one time, by model; those of a model's instances are added up."""

    time_s: float
    values: Mapping[tuple[str, str], float]
    """Gauges and counters, by model and name, over all further labels."""
    buckets: Mapping[tuple[str, str], Mapping[float, float]]
    """Histograms: how many values were at most each bound."""

    @property
    def models(self) -> list[str]:
        return sorted({model for model, name in self.values if name == READY})


def parse(text: str, time_s: float) -> Snapshot:
    """From the text of /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[tuple[str, str], float] = {}
    buckets: dict[tuple[str, str], dict[float, float]] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(("vllm:", "flashserve:")):
            continue
        for sample in family.samples:
            key = (sample.labels.get("model_name", ""), sample.name)
            if "le" in sample.labels:
                counts = buckets.setdefault((key[0], family.name), {})
                bound = float(sample.labels["le"])
                counts[bound] = counts.get(bound, 0) + sample.value
            else:
                values[key] = values.get(key, 0) + sample.value
                if sample.name == READY:
                    values[key[0], INSTANCES] = values.get((key[0], INSTANCES), 0) + 1
    return Snapshot(time_s, values, buckets)


@dataclass(frozen=True)
class Change:
    """One model between two looks."""

    model: str
    before: Snapshot
    now: Snapshot

    def gauge(self, name: str) -> float:
        return self.now.values.get((self.model, name), math.nan)

    def gained(self, name: str) -> float:
        """Of a counter. One that fell began anew with its model's process."""
        now, before = (snapshot.values.get((self.model, name), 0.0) for snapshot in (self.now, self.before))
        return now if now < before else now - before

    def rate(self, *names: str) -> float:
        """Of counters together, per second."""
        seconds = self.now.time_s - self.before.time_s
        return sum(map(self.gained, names)) / seconds if seconds > 0 else math.nan

    def quantile(self, name: str, share: float) -> float:
        """Of a histogram's values in between; NaN if there are none, its highest bound if it is beyond."""
        now = self.now.buckets.get((self.model, name), {})
        before = self.before.buckets.get((self.model, name), {})
        bounds = sorted(now)
        counts = [max(0.0, now[bound] - before.get(bound, 0.0)) for bound in bounds]
        if not counts or not counts[-1]:
            return math.nan
        wanted = share * counts[-1]
        lower = (0.0, 0.0)
        for bound, count in zip(bounds, counts, strict=True):
            if count >= wanted and bound != math.inf:  # linear within the bucket, as Prometheus has it
                return lower[0] + (bound - lower[0]) * (wanted - lower[1]) / max(count - lower[1], 1e-9)
            if bound != math.inf:
                lower = (bound, count)
        return lower[0]

    @property
    def hit_rate(self) -> float:
        asked = self.gained(QUERIES)
        return self.gained(HITS) / asked if asked else math.nan

    @property
    def not_answered(self) -> float:
        """Errors and cancellations in between."""
        return self.gained("flashserve:request_errors_total") + self.gained("flashserve:requests_cancelled_total")


# --- on the screen -----------------------------------------------------------------------------------------

COLUMNS = (
    *("model", "engines", "run", "wait", "KV", "req/s", "prompt tok/s", "out tok/s"),
    *("TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "cached", "failed"),
)


def row(change: Change) -> list[str]:
    """A model's line, by COLUMNS."""
    ready, instances = change.gauge(READY), change.gauge(INSTANCES)
    return [
        change.model,
        f"{ready:.0f}" if ready == instances else f"[red]{ready:.0f} of {instances:.0f}[/red]",
        number(change.gauge("vllm:num_requests_running")),
        number(change.gauge("vllm:num_requests_waiting")),
        share(change.gauge("vllm:kv_cache_usage_perc") / instances),
        number(change.rate("vllm:request_success_total"), 1),
        number(change.rate("vllm:prompt_tokens_total")),
        number(change.rate("vllm:generation_tokens_total")),
        *(milliseconds(change.quantile(TTFT, q)) for q in (0.5, 0.99)),
        *(milliseconds(change.quantile(BETWEEN, q)) for q in (0.5, 0.99)),
        share(change.hit_rate),
        number(change.not_answered),
    ]


def number(value: float, digits: int = 0) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f} ms"


def table(before: Snapshot, now: Snapshot, title: str, width: int) -> RenderableType:
    """A line for each model; in a terminal that is too narrow for that, a column."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    rows = [row(Change(model, before, now)) for model in now.models]
    if not rows:
        shown.add_row("[yellow]no model that reports metrics is loaded[/yellow]")
        return shown
    columns = list(zip(COLUMNS, *rows, strict=True))
    if sum(2 + max(map(len, column)) for column in columns) > width:
        rows, columns = [list(column) for column in columns[1:]], list(zip(columns[0], strict=True))
    for index, column in enumerate(columns):
        shown.add_column(column[0], justify="left" if index == 0 else "right")
    for cells in rows:
        shown.add_row(*cells)
    return shown


@dataclass
class Watch:
    """Looks at a server again and again, and remembers a window of it."""

    url: str
    window_s: float
    _seen: deque[Snapshot] = field(default_factory=deque)

    def look(self, http: httpx.Client) -> None:
        """Raises httpx.HTTPError where nothing answers."""
        response = http.get(self.url)
        response.raise_for_status()
        self._seen.append(parse(response.text, time.monotonic()))
        while len(self._seen) > 2 and self._seen[1].time_s <= self._seen[-1].time_s - self.window_s:
            self._seen.popleft()

    def show(self, width: int) -> RenderableType:
        before, now = self._seen[0], self._seen[-1]
        silent_s = time.monotonic() - now.time_s
        state = f"over {now.time_s - before.time_s:.0f} s"
        if silent_s > SILENT_S:
            state = f"[red]no answer for {silent_s:.0f} s[/red]"
        return table(before, now, f"{self.url}, {time.strftime('%H:%M:%S')}, {state}", width)


def run_top(args: argparse.Namespace) -> int:
    """`flashserve top`."""
    import httpx

    try:
        import prometheus_client.parser  # noqa: F401
        import rich.console
        import rich.live
    except ImportError as error:
        print(f"flashserve: top needs {error.name}: pip install 'flashserve[top]'", file=sys.stderr)
        return 1
    url = args.url.rstrip("/").removesuffix("/metrics") + "/metrics"
    watch, console = Watch(url, args.window), rich.console.Console()
    try:
        with httpx.Client(timeout=SCRAPE_TIMEOUT_S, trust_env=False) as http:
            watch.look(http)
            if args.once or not console.is_terminal:
                time.sleep(args.interval)
                watch.look(http)
                console.print(watch.show(console.width))
                return 0
            with rich.live.Live(watch.show(console.width), console=console, screen=True, auto_refresh=False) as live:
                for _ in itertools.count():
                    time.sleep(args.interval)
                    with contextlib.suppress(httpx.HTTPError):  # the title says for how long
                        watch.look(http)
                    live.update(watch.show(console.width), refresh=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"flashserve: no metrics at {url} ({error}): is the server running? --url says where", file=sys.stderr)
        return 1
    return 0
