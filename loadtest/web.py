"""Locust's web page, with what its own statistics are too coarse for: a tab that has the percentiles of first tokens
and of gaps between tokens over time, and a page that draws them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, jsonify, request

from .statistics import Second, Statistics

KEY = "token-latencies"
PAGE_PATH = Path(__file__).with_name("web_page.html")
ROWS = 60  # of the table, and points of a line: a run's seconds are merged until they are no more
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
COLUMNS = [
    {"key": "from_s", "title": "From second"},
    {"key": "requests", "title": "First tokens"},
    *({"key": f"ttft_{q}_ms", "title": f"TTFT {q} (ms)"} for q in QUANTILES),
    *({"key": f"itl_{q}_ms", "title": f"ITL {q} (ms)"} for q in QUANTILES),
]


def latencies_over_time(statistics: Statistics) -> list[dict[str, Any]]:
    """A row for each part of the run, with the percentiles of what came in it; None where nothing came."""
    if not statistics.seconds:
        return []
    width = max(statistics.seconds) // ROWS + 1
    parts: dict[int, Second] = {}
    for at, second in sorted(statistics.seconds.items()):
        parts.setdefault(at // width, Second()).merge(second)
    rows = []
    for number, part in parts.items():
        row: dict[str, Any] = {"from_s": number * width, "requests": part.ttft.count}
        for name, histogram in (("ttft", part.ttft), ("itl", part.itl)):
            for q, share in QUANTILES.items():
                row[f"{name}_{q}_ms"] = round(1000 * histogram.quantile(share), 2) if histogram.count else None
        rows.append(row)
    return rows


def extend_web_ui(web_ui: Any, statistics: Callable[[], Statistics]) -> None:
    """statistics: those of the run so far, over all processes."""
    extension = Blueprint(KEY, __name__, url_prefix=web_ui.environment.parsed_options.web_base_path)
    # Locust keeps what it does not set itself. The keys of tab, table and data must match.
    web_ui.template_args |= {
        "extended_tabs": [{"key": KEY, "title": "Token latencies"}],
        "extended_tables": [{"key": KEY, "structure": COLUMNS}],
        "extended_csv_files": [{"href": f"./{KEY}", "title": "Chart of token latencies"}],
    }

    @extension.route(f"/{KEY}")
    @web_ui.auth_required_if_enabled
    def page() -> Response:
        return Response(PAGE_PATH.read_text(encoding="utf-8"), mimetype="text/html")

    @extension.route(f"/{KEY}/data")
    @web_ui.auth_required_if_enabled
    def data() -> Response:
        return jsonify(latencies_over_time(statistics()))

    @web_ui.app.after_request
    def add_rows(response: Response) -> Response:
        """The tab shows what comes with Locust's own figures."""
        if request.endpoint == "locust.request_stats" and response.is_json:
            rows = [{key: "-" if value is None else value for key, value in row.items()}
                    for row in reversed(latencies_over_time(statistics()))]  # fmt: skip
            response.set_data(jsonify({**response.get_json(), "extended_stats": [{"key": KEY, "data": rows}]}).data)
        return response

    web_ui.app.register_blueprint(extension)
