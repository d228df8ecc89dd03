"""Command line, environment, log and ports of the tritonserver that the launcher starts."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from flashserve.launcher import ports, process, workspace
from flashserve.launcher.discover import TritonInstall, stub_version
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.process import ServerProcess
from flashserve.launcher.triton_arguments import TritonArguments

INSTALL = TritonInstall(
    Path("/t/bin/tritonserver"), Path("/t/backends"), None, (Path("/t/lib"),), "for a test", "2.51.0"
)
SPACE = workspace.Workspace("flashserve-1-abc", Path("/tmp/flashserve-1-abc-x"))
ENDPOINTS = ports.Endpoints("0.0.0.0", 8000, 8001, 8002)


def run_and_show(*lines: str, verbose: bool = False) -> tuple[ServerProcess, list[str]]:
    """A process that prints `lines` in tritonserver's place, and what the user sees of them."""
    shown: list[str] = []
    server = ServerProcess([sys.executable, "-c", f"print({chr(10).join(lines)!r})"], {}, shown.append, verbose)
    while server.exit_code() is None:
        time.sleep(0.01)
    server.wait(5)
    return server, shown


def command(*words: str) -> list[str]:
    return process.command(INSTALL, SPACE, ["/a", "/b"], ENDPOINTS, TritonArguments.parse(words))


def test_the_command_line_loads_every_model_under_explicit_control() -> None:
    line = command("--log-verbose=1")
    assert line[0] == "/t/bin/tritonserver"
    assert {"--model-repository=/a", "--model-repository=/b", "--model-control-mode=explicit"} < set(line)
    assert {"--load-model=*", "--backend-config=python,shm-region-prefix-name=flashserve-1-abc-"} < set(line)
    assert line[-1] == "--log-verbose=1"


@pytest.mark.parametrize(
    ("words", "load"),
    [
        (["--load-model=x"], ["--load-model=x"]),
        (
            ["--model-control-mode=explicit", "--load-model", "x", "--load-model=y"],
            ["--load-model=x", "--load-model=y"],
        ),
        (["--model-control-mode=explicit"], []),
    ],
)
def test_a_choice_of_models_replaces_all(words: list[str], load: list[str]) -> None:
    line = command(*words)
    assert [word for word in line if "load-model" in word] == load
    assert [word for word in line if "control-mode" in word] == ["--model-control-mode=explicit"]


def test_the_environment_leads_to_this_interpreter_and_back_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/users/own")
    env = process.environment(INSTALL, SPACE, ENDPOINTS)
    assert env["PATH"].split(":")[:2] == [str(SPACE.programs), str(Path(sys.executable).parent)]
    assert env["LD_LIBRARY_PATH"].split(":")[-2:] == ["/t/lib", "/users/own"]
    assert env["FLASHSERVE_TRITON_HTTP"] == "127.0.0.1:8000"  # 0.0.0.0 is no address to ask
    assert env["FLASHSERVE_RUN"] == "flashserve-1-abc"


def test_load_states_come_from_the_log() -> None:
    server, _ = run_and_show(
        'I1120 19:45:38.755263 9570 model_lifecycle.cc:472] "loading: demo:1"',
        'I1120 19:45:38.755263 9570 model_lifecycle.cc:472] "loading: slow:1"',
        'I1120 19:45:38.755263 9570 model_lifecycle.cc:472] "loading: bad:1"',
        "I1120 19:45:40.905564 9570 model_lifecycle.cc:839] \"successfully loaded 'demo'\"",
        "E1120 19:45:40.905564 9570 model_lifecycle.cc:642] \"failed to load 'bad' version 1: Internal: "
        'TritonModelException: the \\"weights\\" are missing\\n\\nAt:\\n  /x/model.py(1): <module>\\n"',
    )
    assert server.loading() == ["slow"]
    assert server.failures() == {"bad": 'the "weights" are missing'}


def test_the_user_sees_warnings_and_what_models_say_but_not_triton_s_own_story() -> None:
    story = [
        'I1120 19:45:38.755263 9570 model_lifecycle.cc:472] "loading: demo:1"',
        "+------+",
        "| Model |",
        "",
        'E1120 19:36:17.779897 7369 server.cc:241] "CudaDriverHelper has not been initialized."',
    ]
    telling = [
        'I1120 19:45:40.787084 9570 loop.py:23] "1,024 blocks of 16 tokens"',
        'W1120 19:45:40.787084 9570 http_server.cc:1] "something odd"',
        "printed by a model",
    ]
    _, shown = run_and_show(*story, *telling)
    if not Path("/dev/nvidiactl").exists():
        assert shown == telling
    _, everything = run_and_show(*story, *telling, verbose=True)
    assert everything == story + telling


def test_a_taken_port_is_named_with_the_option_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LauncherError, match=f"port {port} is taken") as caught:
            ports.choose("127.0.0.1", 0, port, 0)
    assert "--grpc-port" in caught.value.advice


def test_port_zero_is_any_free_one_and_no_port_is_given_twice() -> None:
    endpoints = ports.choose("127.0.0.1", 0, 0, 0)
    assert len({endpoints.http, endpoints.grpc, endpoints.metrics}) == 3
    with pytest.raises(LauncherError, match="given twice"):
        ports.choose("127.0.0.1", endpoints.http, endpoints.http, 0)


def test_the_stub_s_python_is_read_from_the_file(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.write_bytes(b"\x7fELF...libpython3.12.so.1.0\0...")
    assert stub_version(stub) == "3.12"
    assert stub_version(tmp_path / "none") is None
