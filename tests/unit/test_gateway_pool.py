"""What the gateway knows of its servers: which are down, loading, or unknown, and what that costs them."""

from __future__ import annotations

import asyncio

import pytest

from flashserve_client import ConnectionFailed, ModelInfo, Timeout
from flashserve_gateway.patience import Patience
from flashserve_gateway.settings import Limits, Settings
from gateway_peers import CHAT, Gate, MemoryTransport, fails, gate, piece, silent

QUICK = Settings(refresh_s=0.02)


class States(MemoryTransport):
    """A server whose index says what a test says."""

    infos: tuple[ModelInfo, ...] = ()
    asked_for_models = 0

    async def models(self) -> list[ModelInfo]:
        self.asked_for_models += 1
        await asyncio.sleep(0.01)
        return list(self.infos)


def info(name: str, version: str, state: str) -> ModelInfo:
    return ModelInfo(name, version, state, "")


async def goes_down(gateway: Gate, number: int = 0) -> None:
    while not gateway.pool.servers[number].error:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("path", ["/ready", "/health"])
async def test_a_server_that_dies_after_it_was_seen_is_not_ready(path: str):
    async with gate(settings=QUICK) as gateway:
        gateway.engine.index_error = ConnectionFailed("no server at 10.0.0.1")
        await goes_down(gateway)
        response = await gateway.http.get(path)
        assert response.status_code == 503
        assert "no server can be reached" in response.text and "10.0.0.1" not in response.text


async def test_of_two_servers_the_one_that_lives_is_told_of():
    other = MemoryTransport(names=("other",))
    async with gate(settings=QUICK, others=(other,)) as gateway:
        other.index_error = ConnectionFailed("gone")
        await goes_down(gateway, 1)
        response = await gateway.http.get("/ready")
        assert response.status_code == 200
        assert response.json()["detail"] == {"demo": "ok", "other": "its server cannot be reached"}
        missing = await gateway.chat(model="other")
        assert missing.status_code == 503 and missing.headers["retry-after"] == "1"
        assert (await gateway.http.get("/v1/models/other")).status_code == 503
        assert (await gateway.chat(model="nope")).status_code == 404


async def test_probes_that_come_together_are_one_also_when_it_takes_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flashserve_gateway.pool._PROBE_LIFETIME_S", 0.2)

    async def slow(asked):
        await asyncio.sleep(0.3)  # longer than its answer counts
        yield piece("x", "length")

    async with gate(MemoryTransport(slow)) as gateway:
        for response in await asyncio.gather(*(gateway.http.get("/ready") for _ in range(30))):
            assert response.status_code == 200
        assert len(gateway.engine.asked) == 1


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["LOADING"], 503), (["READY", "UNAVAILABLE"], 200), (["UNAVAILABLE", "READY"], 200),
        (["LOADING", "UNAVAILABLE"], 503), (["UNAVAILABLE"], 404), ([], 404),
    ],
)  # fmt: skip
async def test_what_triton_says_of_a_models_versions(states: list[str], status: int):
    server = States()
    server.infos = tuple(info("demo", str(number), state) for number, state in enumerate(states))
    async with gate(server) as gateway:
        response = await gateway.chat()
        assert response.status_code == status
        assert ("retry-after" in response.headers) == (status == 503)


async def test_models_that_nobody_has_are_not_a_question_each():
    server = States()
    server.infos = (info("demo", "1", "READY"),)
    async with gate(server, Settings(refresh_s=60)) as gateway:
        before = server.asked_for_models
        responses = await asyncio.gather(*(gateway.chat(model=f"model-{number}") for number in range(50)))
        assert {response.status_code for response in responses} == {404}
        assert server.asked_for_models - before <= 1


async def test_a_server_that_hangs_does_not_hide_what_another_has():
    slow = MemoryTransport(names=("slow",))
    async with gate(settings=QUICK, others=(slow,)) as gateway:
        hanging = asyncio.Event()

        async def never() -> list[ModelInfo]:
            hanging.set()
            await asyncio.Event().wait()
            return []

        slow.models = never  # type: ignore[method-assign]
        gateway.engine.names = ("demo", "new")
        await hanging.wait()
        while "new" not in gateway.pool.servers[0].models:
            await asyncio.sleep(0.005)
        listed = await gateway.http.get("/v1/models")
        assert [row["id"] for row in listed.json()["data"]] == ["demo", "new", "slow"]
        assert (await gateway.chat(model="new")).status_code == 200


async def test_an_unexpected_error_of_the_index_does_not_end_the_looking():
    async with gate(settings=QUICK) as gateway:
        gateway.engine.index_error = ZeroDivisionError("odd")
        await goes_down(gateway)
        gateway.engine.index_error = None
        while gateway.pool.servers[0].error:
            await asyncio.sleep(0.005)
        assert (await gateway.chat()).status_code == 200


async def test_templates_are_told_apart_by_all_of_their_fields():
    async with gate(MemoryTransport(template="%s<think>\n")) as gateway:
        fields = {"chat_template_kwargs": {"a": "x" * 2000, "b": True}}
        assert await gateway.pool.prompt_ends_with("<think>", "demo", fields)
        gateway.engine.template = "%s"
        assert await gateway.pool.prompt_ends_with("<think>", "demo", fields)  # asked once a minute
        fields = {"chat_template_kwargs": {"a": "x" * 2000, "b": False}}
        assert not await gateway.pool.prompt_ends_with("<think>", "demo", fields)


# --- several servers ---------------------------------------------------------------------------------------------


async def test_another_server_is_tried_before_the_first_token_and_never_after():
    broken, good = MemoryTransport(fails(ConnectionFailed("gone"))), MemoryTransport()
    async with gate(broken, others=(good,)) as gateway:
        gateway.pool.servers[1].in_flight = 1  # so that the other one is asked first
        assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == "one two three"
        assert (len(broken.asked), len(good.asked)) == (1, 1)
        broken.script = fails(ConnectionFailed("gone"), "one ")
        text = (await gateway.chat(stream=True)).text
        assert '"error"' in text and "two" not in text
        assert (len(broken.asked), len(good.asked)) == (2, 1)


async def test_the_least_loaded_server_gets_the_request():
    one, other = MemoryTransport(), MemoryTransport()
    async with gate(one, others=(other,)) as gateway:
        gateway.pool.servers[0].in_flight = 1
        for _ in range(4):
            await gateway.chat()
        assert (len(one.asked), len(other.asked)) == (0, 4)


# --- time --------------------------------------------------------------------------------------------------------


async def one_then_silence(asked):
    yield piece("one ")
    await asyncio.Event().wait()


async def test_a_whole_answer_has_a_time_limit():
    settings = Settings(limits=Limits(whole_timeout_s=0.1))
    async with gate(MemoryTransport(silent), settings) as gateway:
        for path, body in (("/v1/chat/completions", {**CHAT, "n": 2}), ("/v1/generate_nobatch", {"prompt": "a"})):
            response = await gateway.http.post(path, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "timeout"
            assert await gateway.ended() == "cancelled"


async def test_a_stream_that_stalls_ends():
    settings = Settings(keep_alive_s=0.05, limits=Limits(stall_timeout_s=0.2))
    async with gate(MemoryTransport(one_then_silence), settings) as gateway:
        text = (await gateway.chat(stream=True)).text
        assert "one " in text and '"code":"timeout"' in text and "[DONE]" not in text
        assert await gateway.ended() == "cancelled"


async def test_patience_counts_the_waits_and_not_what_lies_between():
    patience = Patience(0.05)
    for _ in range(3):
        with patience:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.12)
    with pytest.raises(Timeout), patience:
        await asyncio.Event().wait()
    task = asyncio.create_task(asyncio.Event().wait())
    patience = Patience(60)
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError), patience:  # somebody else's cancellation stays one
        await task
    patience.end()
