"""The server that a load test asks: which model of it, and where the demonstration finds one."""

from __future__ import annotations

import argparse

import pytest

from client_peers import PEERS, Peer, peer_in_thread
from flashserve_client import InvalidRequest
from loadtest import command, demonstration
from loadtest.streams import parse_target


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize(
    ("ready", "chosen"), [(["demo"], "demo"), (["demo", "smollm2"], "smollm2"), (["mine"], "mine"), ([], "smollm2")]
)
def test_the_model_is_one_that_the_server_has(kind: str, ready: list[str], chosen: str) -> None:
    with peer_in_thread(kind) as peer:
        peer.index = [{"name": name, "version": "1", "state": "READY"} for name in ready]
        targets = [parse_target("http://127.0.0.1:1/v1"), parse_target(peer.url)]
        assert command.find_model(targets) == chosen


def test_of_several_models_one_is_to_be_named() -> None:
    with peer_in_thread("http") as peer:
        peer.index = [{"name": name, "version": "1", "state": "READY"} for name in ("a", "b")]
        with pytest.raises(InvalidRequest, match=r"choose one with --model \(a, b\)"):
            command.find_model([parse_target(peer.url)])


def test_a_run_asks_that_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("loadtest.live.watch_run", lambda words, settings: seen.append((words, settings.model)) or 0)
    parser = argparse.ArgumentParser()
    command.add_commands(parser.add_subparsers())
    with peer_in_thread("http") as peer:
        args = parser.parse_args(["bench", peer.url])
        assert args.run(args) == 0
    ((words, model),) = seen
    assert model == "demo" and "--model=demo" in words


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    """One that runs already."""
    with peer_in_thread("http") as peer:
        monkeypatch.setattr(demonstration, "HTTP_PORT", peer.port)
        monkeypatch.setattr(demonstration, "own_server", None)
        yield peer


def test_a_server_that_runs_already_is_used(server: Peer) -> None:
    with demonstration.serving():
        assert server.controlled == []


def test_what_it_lacks_it_is_given_for_the_time(server: Peer) -> None:
    server.ready = False  # as `make serve` has another model
    with demonstration.serving():
        assert server.controlled == ["load demo"]
    assert server.controlled == ["load demo", "unload demo"]


def test_a_server_without_such_a_model_is_named(server: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "LOADING", "/v2/repository/models/broken")
    server.ready = False
    with pytest.raises(SystemExit, match="does not load the model demo"), demonstration.serving():
        pass
