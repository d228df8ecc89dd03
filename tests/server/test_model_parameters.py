"""What config.pbtxt and model.json say about the frontend, with the names and the meaning of Triton's vLLM backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from async_requests import engine_of
from harness import HTTP, Server, wait_until
from null_models import null_model, write_null_model
from requests_helper import generate, post

REPORTED = "vllm:generation_tokens_total"


def parameter(name: str, value: str) -> str:
    return f'parameters: {{ key: "{name}" value: {{ string_value: "{value}" }} }}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_null_model(tmp_path_factory.mktemp("models") / "null")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Models whose configuration is all that differs."""
    server = Server({"plain": null_model(folder)}, arguments=["--serve-vllm-models"])
    server.add_model("unreported", null_model(folder), parameter("REPORT_CUSTOM_METRICS", "false"))
    server.add_model("without_stats", null_model(folder, disable_log_stats=True))
    server.add_model("watched", null_model(folder), parameter("ENABLE_VLLM_HEALTH_CHECK", "true"))
    for name, lines in (("vllm", ""), ("vllm_reported", parameter("REPORT_CUSTOM_METRICS", "true"))):
        configuration = server.add_model(name, null_model(folder)) / "config.pbtxt"
        configuration.write_text(f'backend: "vllm"\n{lines}\n')
    with server:
        yield server


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("plain", True),
        ("unreported", False),
        ("without_stats", False),
        ("vllm", False),
        ("vllm_reported", True),
    ],
)
def test_metrics_are_reported_as_the_configuration_says(server: Server, model: str, expected: bool) -> None:
    assert generate(server, model=model, text_input="hello", max_tokens=3)["text_output"]
    reported = [line for line in HTTP.get(server.metrics).text.splitlines() if line.startswith(REPORTED)]
    assert any(f'model_name="{model}"' in line for line in reported) == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("plain", "temperature must be a number in [0, 1000], not -1 [code=INVALID_ARG]"),
        ("vllm", "Error generating stream: temperature must be a number in [0, 1000], not -1"),
    ],
)
def test_clients_of_the_vllm_backend_get_its_form_of_errors(server: Server, model: str, message: str) -> None:
    response = post(server, {"text_input": "hello", "temperature": -1}, model=model)
    assert (response.status_code, response.json()["error"]) == (400, message)


def test_a_model_with_a_health_check_is_unloaded_when_its_engine_is_dead(server: Server) -> None:
    """Then its readiness says so; without the check the engine is started anew and the model stays ready."""
    ready = f"{server.http}/v2/models/watched/ready"
    assert HTTP.get(ready).status_code == 200
    engine_of(server, "watched").kill()
    answers: list[str] = []

    def is_unloaded_after_a_request() -> bool:
        answers.append(post(server, {"text_input": "x"}, model="watched").text)
        return HTTP.get(ready).status_code != 200

    assert wait_until(is_unloaded_after_a_request, 10)
    assert "Model is unavailable due to unhealthy vLLM engine" in "".join(answers)
    assert HTTP.get(f"{server.http}/v2/models/plain/ready").status_code == 200
    assert wait_until(lambda: not server.stubs("watched"), 15)
    server.load("watched")
    assert generate(server, model="watched", text_input="hello", max_tokens=3)["text_output"]


def test_a_server_without_metrics_serves_all_the_same(folder: Path) -> None:
    with Server({"quiet": null_model(folder)}, triton_arguments=["--allow-metrics=false"]) as server:
        assert generate(server, model="quiet", text_input="hello", max_tokens=3)["text_output"]
        assert "Traceback" not in server.log
