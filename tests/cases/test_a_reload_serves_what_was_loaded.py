"""A model that is brought back is the one that was loaded, also where a client gave it a configuration or files."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashserve.launcher import health
from flashserve.launcher.loads import Loads
from flashserve.load_notes import LoadNote
from harness import HTTP, Server, wait_until
from null_models import null_model, write_null_model

CONTEXT_LEN = 48
CONFIG = {"backend": "flashserve", "parameters": {"REPORT_CUSTOM_METRICS": {"string_value": "false"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_null_model(tmp_path_factory.mktemp("models") / "null")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Two of its three models are others than its repository holds; one is not even there."""
    with Server({name: null_model(folder) for name in ("plain", "configured")}) as server:
        short = json.dumps(null_model(folder, max_model_len=CONTEXT_LEN)).encode()
        load(server, "configured")
        load(server, "given", {"file:1/model.json": base64.b64encode(short).decode()})
        yield server


def load(server: Server, model: str, files: dict[str, str] | None = None) -> None:
    parameters = {"config": json.dumps(CONFIG), **(files or {})}
    url = f"{server.http}/v2/repository/models/{model}/load"
    HTTP.post(url, json={"parameters": parameters}, timeout=60).raise_for_status()


def assert_they_are_what_was_loaded(server: Server) -> None:
    def parameters(model: str) -> Any:
        return HTTP.get(f"{server.http}/v2/models/{model}/config").json()["parameters"]

    assert parameters("plain") == {}
    assert parameters("configured") == parameters("given") == CONFIG["parameters"]
    body = {"text_input": "x" * 2 * CONTEXT_LEN, "max_tokens": 1}
    answers = {name: HTTP.post(f"{server.http}/v2/models/{name}/generate", json=body) for name in ("plain", "given")}
    assert answers["plain"].status_code == 200, answers["plain"].text
    assert answers["given"].status_code == 400 and str(CONTEXT_LEN) in answers["given"].text


def test_after_the_death_of_stubs(server: Server) -> None:
    for model in ("plain", "configured", "given"):
        os.kill(server.stubs(model)[0].pid, signal.SIGKILL)
    for model in ("plain", "configured", "given"):
        server.wait_for_log(f"model {model}: ready again", 100)
    assert_they_are_what_was_loaded(server)


@pytest.mark.slow
def test_after_the_death_of_tritonserver(server: Server) -> None:
    for _ in range(2):  # what was brought back is brought back again
        wait_until(lambda: False, health.ASK_PERIOD_S + 1)  # the launcher has asked for the models since
        copy = Path(server.stubs("given")[0].model_path).parent.parent
        (before,) = server.tritonserver_pids()
        os.kill(before, signal.SIGKILL)
        assert wait_until(lambda: server.tritonserver_pids() not in ([], [before]), 60)  # noqa: B023
        assert wait_until(lambda: ready(server, "given") and ready(server, "configured"), 100), server.log[-4000:]
        assert_they_are_what_was_loaded(server)
        assert not copy.exists(), "tritonserver's copy of the files outlived it"


def ready(server: Server, model: str) -> bool:
    try:
        return HTTP.get(f"{server.http}/v2/models/{model}/ready", timeout=5).status_code == 200
    except Exception:
        return False


def test_files_that_are_gone_are_not_replaced_by_the_repositorys(server: Server) -> None:
    model = "given"
    (stub,) = server.stubs(model)
    shutil.rmtree(Path(stub.model_path).parent.parent)
    os.kill(stub.pid, signal.SIGKILL)
    server.wait_for_log("model given: .* the files that a client loaded it with are gone", 30)
    assert wait_until(lambda: not ready(server, model), 30)


def test_what_a_start_of_tritonserver_gives_needs_no_parameters(tmp_path: Path) -> None:
    loads = Loads(tmp_path, remote=False)
    LoadNote('{"a": 1}', "/repository/demo").write(tmp_path, "demo")
    loads.started(["demo", "of_another_backend"])
    assert loads.parameters("demo") == loads.parameters("of_another_backend") == {}
    LoadNote('{"a": 2}', "/repository/demo").write(tmp_path, "demo")
    assert loads.parameters("demo") == {"config": '{"a": 2}'}


@pytest.mark.parametrize(("remote", "are"), [(False, True), (True, False)], ids=["folder", "bucket"])
def test_copies_of_a_buckets_models_are_no_clients_files(tmp_path: Path, remote: bool, are: bool) -> None:
    loads = Loads(tmp_path, remote)
    LoadNote("{}", "/tmp/folderAbC123").write(tmp_path, "demo")
    loads.started(["demo"])
    assert loads.are_a_clients("demo") == are
