"""The synchronous client: the asynchronous one on a thread, so only what the thread adds is tested here."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import flashserve_client
from client_peers import PEERS, Error, Peer, peer_in_thread, say
from flashserve_client import Client, Delta, InvalidRequest, Unavailable
from flashserve_client import sync_client as sync_module


@pytest.fixture(params=PEERS)
def peer(request):
    with peer_in_thread(request.param) as peer:
        yield peer


def test_the_interface_is_that_of_the_asynchronous_client(peer: Peer):
    with Client(peer.url) as client:
        assert client.generate("x").text == "one two three"
        stream = client.stream("x")
        assert list(stream) == [Delta("one ", 1, None), Delta("two ", 1, None), Delta("three", 1, "stop")]
        assert stream.finished
        assert stream.result.text == "one two three"
        assert client.health().engine_ready
        assert client.models()[0].name == "demo"
        client.load_model("m")
        client.unload_model("m")
    assert peer.controlled == ["load m", "unload m"]


def test_errors_arrive_in_the_calling_thread(peer: Peer):
    async def script(asked):
        yield say("a")
        yield Error("dead [code=UNAVAILABLE retry_after_ms=5]")

    peer.script = script
    with Client(peer.url) as client:
        with pytest.raises(InvalidRequest):
            client.stream("x", stop=object())
        stream = client.stream("x")
        assert next(stream).text == "a"
        with pytest.raises(Unavailable) as caught:
            next(stream)
        assert caught.value.partial.text == "a"
        with pytest.raises(Unavailable):
            next(stream)


def test_threads_share_a_client(peer: Peer):
    texts: list[str] = []
    with Client(peer.url) as client:

        def work():
            texts.extend("".join(delta.text for delta in client.stream("x")) for _ in range(5))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == ["one two three"] * 40


def test_clients_in_one_process_do_not_disturb_each_other(peer: Peer, caplog):
    """grpc.aio has one poller for all loops, which earlier versions made complain."""
    failures: list[BaseException] = []

    def work():
        try:
            with Client(peer.url) as client:
                for _ in range(5):
                    assert client.generate("x").text == "one two three"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_reader_that_stalls_holds_a_bounded_number_of_pieces(peer: Peer, monkeypatch):
    monkeypatch.setattr(sync_module, "_MAX_BUFFERED", 16)

    async def script(asked):
        for _ in range(299):
            yield say("x" * 10)
        yield say("x" * 10, "length")

    peer.script = script
    with Client(peer.url) as client, client.stream("x") as stream:
        next(stream)
        time.sleep(0.3)
        assert 1 <= stream._queue.qsize() <= 16
        assert sum(1 for _ in stream) == 299
        assert stream.result.completion_tokens == 300


def test_a_program_that_forgets_to_close_still_ends(peer: Peer):
    program = (
        f"from flashserve_client import Client\nclient = Client({peer.url!r})\n"
        "stream = client.stream('x')\nprint(next(stream).text)\n"
    )
    package = Path(flashserve_client.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "one", "")


def test_importing_the_package_is_light():
    """`flashserve serve` imports it for its subcommands: grpc and tritonclient take 250 ms, httpx 165, numpy 100."""
    program = (
        "import sys, flashserve_client, flashserve_client.cli\n"
        "heavy = {'grpc', 'httpx', 'numpy', 'torch', 'tritonclient', 'flashserve'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    package = Path(flashserve_client.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(package)}, capture_output=True, text=True, timeout=20
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
