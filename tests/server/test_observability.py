"""Dashboard and alerts against a real server: every metric that they name is there, every panel has its data."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flashserve.launcher.ports import free_port
from harness import HTTP, ROOT, Server, wait_until
from requests_helper import GrpcCall, generate, post, wait_idle

FOLDER = ROOT / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana" / "flashserve.json").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = {
    f"{panel['id']}: {panel['title']}": [target["expr"] for target in panel["targets"]]
    for panel in DASHBOARD["panels"]
    if "targets" in panel
}
METRIC = re.compile(r"\b(?:vllm|flashserve):\w+")
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="no prometheus (apt install prometheus)"
)


def test_the_dashboards_file_is_what_its_table_says() -> None:
    table = runpy.run_path(str(FOLDER / "dashboard.py"))
    assert table["dashboard"]() == DASHBOARD, "run deploy/observability/dashboard.py"


def test_every_metric_of_dashboard_and_alerts_is_there(server: Server) -> None:
    there = set(re.findall(r"^((?:vllm|flashserve):\w+)\{", HTTP.get(server.metrics).text, re.MULTILINE))
    named = {name for exprs in PANELS.values() for expr in exprs for name in METRIC.findall(expr)}
    named |= {name for rule in RULES for name in METRIC.findall(rule["expr"])}
    assert len(named) > 20
    assert named <= there


@needs_prometheus
def test_the_rules_are_in_order() -> None:
    done = subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A real one that scrapes the server twice a second."""

    def __init__(self, server: Server, folder: Path) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "500ms")
        config["rule_files"] = [str(FOLDER / "alerts.yml")]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.metrics.split("/")[2]]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
            )
        assert wait_until(self._is_ready, 20), (folder / "log").read_text()

    def _is_ready(self) -> bool:
        try:
            return HTTP.get(f"{self._url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expr: str) -> list[dict[str, Any]]:
        for variable in ("$instance", "$model"):
            expr = expr.replace(variable, ".+")
        answer = HTTP.get(f"{self._url}/api/v1/query", params={"query": expr.replace("$__rate_interval", "5s")}).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def value(self, expr: str) -> float:
        (result,) = self.query(expr)
        return float(result["value"][1])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[Prometheus]:
    running = Prometheus(server, tmp_path)
    yield running
    running.close()


@needs_prometheus
def test_every_panel_has_its_data_in_a_real_prometheus(server: Server, prometheus: Prometheus) -> None:
    ask = {"prompt_token_ids": json.dumps([40] * 40), "max_tokens": 7, "ignore_eos": True}
    assert wait_until(lambda: bool(prometheus.query("up == 1")), 20)
    time.sleep(1)  # a rate needs a value from before
    for _ in range(5):
        generate(server, model="counted", **ask)
        assert post(server, {**ask, "temperature": -1}, model="counted").status_code == 400
    endless = GrpcCall(server, {"sampling_parameters": {**ask, "prompt_token_ids": [40] * 40, "max_tokens": 2000},
                                "stream": True}, model="paced")  # fmt: skip
    next(endless)
    counted = '{model_name="counted"}'
    assert wait_until(lambda: prometheus.value(f"vllm:generation_tokens_total{counted}") >= 35, 5)
    assert wait_until(lambda: prometheus.value('vllm:num_requests_running{model_name="paced"}') == 1, 5)
    for title, exprs in PANELS.items():
        for expr in exprs:
            values = [float(result["value"][1]) for result in prometheus.query(expr)]
            assert any(not math.isnan(value) for value in values), f"{title}: {expr} has no data"
    endless.cancel()
    wait_idle(server, "paced")
    ttft = prometheus.value(f"histogram_quantile(0.99, rate(vllm:time_to_first_token_seconds_bucket{counted}[10s]))")
    assert 0 < ttft < 5
    assert not [alert["metric"] for alert in prometheus.query("ALERTS{alertname=~'ServerDown|EngineDown'}")]
