#!/usr/bin/env python3
"""The Grafana dashboard: one table of panels, written as the JSON that Grafana imports.

python deploy/observability/dashboard.py        # writes grafana/flashserve.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "grafana" / "flashserve.json"
COLUMNS = 24  # of Grafana's grid
SELECT = '{instance=~"$instance", model_name=~"$model"}'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """A curve."""

    expr: str
    legend: str = "{{model_name}}"


@dataclass(frozen=True)
class Panel:
    """One picture; ``kind`` is Grafana's type."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    help: str = ""
    kind: str = "timeseries"
    stacked: bool = False
    highest: float | None = None


def rate(metric: str, by: str = "model_name", select: str = SELECT) -> str:
    return f"sum by ({by}) (rate({metric}{select}[$__rate_interval]))"


def quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(
        Query(
            f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le, model_name')})",
            f"{{{{model_name}}}} p{share * 100:.0f}",
        )
        for share in (0.5, 0.9, 0.99)
    )


def mean(metric: str) -> str:
    return f"sum(rate({metric}_sum{SELECT}[$__rate_interval])) / sum(rate({metric}_count{SELECT}[$__rate_interval]))"


HIT_RATE = f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}"
ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        Panel("Requests that end", (Query(f"sum({rate('vllm:request_success_total')})", ""),), "reqps", kind="stat"),
        Panel("Tokens generated per second", (Query(f"sum({rate('vllm:generation_tokens_total')})", ""),), kind="stat"),
        Panel("Run and wait", (
            Query(f"sum(vllm:num_requests_running{SELECT})", "run"),
            Query(f"sum(vllm:num_requests_waiting{SELECT})", "wait"),
        ), kind="stat"),
        Panel("Engines ready", (
            Query(f"sum(flashserve:engine_ready{SELECT})", "ready"),
            Query(f"count(flashserve:engine_ready{SELECT})", "all"),
        ), kind="stat"),
    ),
    "What users feel": (
        Panel("Time to first token", quantiles("vllm:time_to_first_token_seconds"), "s"),
        Panel("Time between tokens", quantiles("vllm:inter_token_latency_seconds"), "s"),
        Panel("Whole request", quantiles("vllm:e2e_request_latency_seconds"), "s"),
        Panel("Where a request's time goes (mean)", (
            Query(mean("vllm:request_queue_time_seconds"), "waits"),
            Query(mean("vllm:request_prefill_time_seconds"), "prefill"),
            Query(mean("vllm:request_decode_time_seconds"), "decode"),
        ), "s", stacked=True),
        Panel("Not answered", (
            Query(rate("flashserve:request_errors_total", "code"), "{{code}}"),
            Query(rate("flashserve:requests_cancelled_total", "reason"), "cancelled: {{reason}}"),
        ), "reqps", stacked=True, help="Errors by code; cancelled by the client, its deadline, or an unload."),
        Panel("Ended by themselves", (
            Query(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),
        ), "reqps", stacked=True),
    ),
    "What the engine does": (
        Panel("Requests", (
            Query(f"vllm:num_requests_running{SELECT}", "{{model_name}} run"),
            Query(f"vllm:num_requests_waiting{SELECT}", "{{model_name}} wait"),
        )),
        Panel("KV blocks in use", (Query(f"vllm:kv_cache_usage_perc{SELECT}"),), "percentunit", highest=1,
              help="Share of the blocks that requests hold. Cached blocks that nobody holds do not count."),
        Panel("Tokens generated per second", (Query(rate("vllm:generation_tokens_total")),)),
        Panel("Prompt tokens per second", (Query(rate("vllm:prompt_tokens_total")),),
              help="Of requests that got their first token, those found in the prefix cache included."),
        Panel("Prompt tokens found in the prefix cache", (Query(HIT_RATE),), "percentunit", highest=1),
        Panel("Steps per second", (
            Query(rate("flashserve:engine_steps_total"), "{{model_name}} all"),
            Query(rate("flashserve:prefill_chunks_total"), "{{model_name}} with a part of a prompt"),
        )),
        Panel("Preempted, restarted", (
            Query(rate("vllm:num_preemptions_total"), "{{model_name}} preemptions/s"),
            Query(f"increase(flashserve:engine_restarts_total{SELECT}[$__rate_interval])", "{{model_name}} restarts"),
        ), help="Both should be zero: too few KV blocks, or an engine that dies."),
    ),
    "What is asked": (
        Panel("Prompt tokens of a request", quantiles("vllm:request_prompt_tokens")),
        Panel("Generated tokens of a request", quantiles("vllm:request_generation_tokens")),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Grafana's model of it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}, "panels": []})
        y += 1
        columns, height = (4, 4) if row[0].kind == "stat" else (2, 8) if len(row) == 2 else (3, 8)
        width = COLUMNS // columns
        for index, panel in enumerate(row):
            place = {"x": index % columns * width, "y": y + index // columns * height, "w": width, "h": height}
            panels.append({**_panel(panel), "gridPos": place})
        y += -(-len(row) // columns) * height
    for number, entry in enumerate(panels, 1):
        entry["id"] = number
    return {
        "title": "flashserve",
        "uid": "flashserve",
        "tags": ["flashserve", "triton", "llm"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    limits = {"min": 0} if panel.highest is None else {"min": 0, "max": panel.highest}
    entry: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expr, "legendFormat": query.legend, "datasource": DATASOURCE}
            for i, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": {"unit": panel.unit, **limits}, "overrides": []},
    }
    if panel.kind == "timeseries":
        entry["fieldConfig"]["defaults"]["custom"] = {
            "fillOpacity": 25 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        }
        entry["options"] = {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}}
    else:
        entry["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto"}
    return entry


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    found = {
        name: f"label_values(vllm:num_requests_running, {label})"
        for name, label in (("instance", "instance"), ("model", "model_name"))
    }
    return [source] + [
        {
            "name": name,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,  # whenever the time range changes: models come and go
            "multi": True,
            "includeAll": True,
            "current": {"text": "All", "value": "$__all"},
        }
        for name, query in found.items()
    ]


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")
