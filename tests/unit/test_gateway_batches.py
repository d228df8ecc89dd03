"""/v1/files and /v1/batches through OpenAI's own package, in front of an engine in memory."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from flashserve_client import Unavailable
from flashserve_client.transport import Chunk
from flashserve_gateway.app import create_app
from flashserve_gateway.batch import job, records
from flashserve_gateway.batch.batches import PRIORITY
from flashserve_gateway.batch.lines import Journal, check_lines
from flashserve_gateway.batch.records import DataFolderError
from flashserve_gateway.keys import Caller, Key, new_key
from flashserve_gateway.settings import Limits, Settings
from gateway_peers import Asked, Gate, MemoryTransport, gate, piece, says, silent

CHAT = "/v1/chat/completions"


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": custom_id}]} if url == CHAT else {}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "demo", **asked, **body}}


def jsonl(*values: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def at(folder: Path, **limits: Any) -> Settings:
    return Settings(data_dir=folder, limits=Limits(queue_wait_s=0, **limits))


def client(gateway: Gate, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=10)


async def begin(asks: openai.AsyncOpenAI, content: bytes, endpoint: Any = CHAT, **more: Any) -> Any:
    file = await asks.files.create(file=("in.jsonl", content), purpose="batch")
    return await asks.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


async def ended(asks: openai.AsyncOpenAI, batch_id: str) -> Any:
    async def wait() -> Any:
        while (batch := await asks.batches.retrieve(batch_id)).status in job.UNFINISHED:
            await asyncio.sleep(0.01)
        return batch

    return await asyncio.wait_for(wait(), 10)


async def answers(asks: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(text) for text in (await asks.files.content(file_id)).text.splitlines()]


async def test_a_batch_has_each_request_once_among_its_answers_or_its_errors(tmp_path: Path) -> None:
    async with gate(settings=at(tmp_path)) as gateway:
        asks = client(gateway)
        lines = [line(f"r{n}") for n in range(30)] + [line("bad", temperature_="x"), line("none", model="nobody")]
        made = await begin(asks, jsonl(*lines), metadata={"for": "a test"})
        assert made.status == "validating" and made.metadata == {"for": "a test"}
        batch = await ended(asks, made.id)
        assert batch.status == "completed" and batch.completed_at and batch.in_progress_at and batch.finalizing_at
        assert batch.request_counts.to_dict() == {"completed": 30, "failed": 2, "total": 32}
        output, errors = await answers(asks, batch.output_file_id), await answers(asks, batch.error_file_id)
        assert Counter(row["custom_id"] for row in [*output, *errors]) == Counter(one["custom_id"] for one in lines)
        for row in output:
            assert row["error"] is None and row["response"]["status_code"] == 200 and row["response"]["request_id"]
            assert row["response"]["body"]["choices"][0]["message"]["content"] == "one two three"
        codes = {row["custom_id"]: row["response"]["body"]["error"]["code"] for row in errors}
        assert codes == {"bad": "unknown_parameter", "none": "model_not_found"}
        assert all(asked.sampling["priority"] == PRIORITY for asked in gateway.engine.asked)
        file = await asks.files.retrieve(batch.output_file_id)
        assert file.purpose == "batch_output" and file.filename.endswith("output.jsonl")
        metrics = (await gateway.http.get("/metrics")).text
        assert 'batch_requests_total{outcome="completed"} 30.0' in metrics and "_gateway:batches 0.0" in metrics


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a", "encoding_format": "float"})],
)
async def test_other_endpoints(tmp_path: Path, endpoint: str, body: dict[str, Any]) -> None:
    engine = MemoryTransport(says("x")) if "completions" in endpoint else MemoryTransport(_embedding)
    async with gate(engine, at(tmp_path)) as gateway:
        asks = client(gateway)
        batch = await ended(asks, (await begin(asks, jsonl(line("a", endpoint, **body)), endpoint)).id)
        [row] = await answers(asks, batch.output_file_id)
        assert row["response"]["status_code"] == 200, row


async def _embedding(asked: Asked) -> AsyncIterator[Any]:
    yield Chunk("[0.0, 1.0]", "stop", 1, 0, "{}")


async def test_files_are_listed_read_and_removed(tmp_path: Path) -> None:
    async with gate(settings=at(tmp_path)) as gateway:
        asks = client(gateway)
        assert [file async for file in asks.files.list()] == []
        made = [
            await asks.files.create(
                file=(f"{n}.jsonl", b"x" * n), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
            )
            for n in range(1, 6)
        ]
        assert made[0].expires_at is not None and made[0].expires_at - made[0].created_at == 3600
        assert {file.id async for file in asks.files.list(limit=2)} == {file.id for file in made}
        assert [file async for file in asks.files.list(purpose="vision")] == []
        assert (await asks.files.content(made[2].id)).content == b"xxx"
        assert (await asks.files.delete(made[2].id)).deleted
        for missing in (asks.files.retrieve, asks.files.content, asks.files.delete):
            with pytest.raises(openai.NotFoundError):
                await missing(made[2].id)
    assert len(list(tmp_path.glob("files/*.jsonl"))) == 4
    async with gate(settings=at(tmp_path)) as gateway:  # they are there at the next start
        assert len([file async for file in client(gateway).files.list()]) == 4


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"\n\n", "empty_file"),
        (b"{\n", "invalid_json_line"),
        (b"[]\n", "invalid_json_line"),
        (jsonl(line("a"), line("a")), "duplicate_custom_id"),
        (jsonl({**line("a"), "method": "GET"}), "invalid_method"),
        (jsonl({**line("a"), "url": "/v1/completions"}), "mismatched_endpoint"),
        (jsonl({**line("a"), "body": 3}), "invalid_body"),
        (jsonl(line("a", stream=True)), "invalid_body"),
        (jsonl(line("")), "invalid_custom_id"),
        (jsonl(line("a", x="y" * 4000)), "line_too_long"),
        (jsonl(*(line(str(n)) for n in range(9))), "too_many_tasks"),
    ],
)
async def test_a_file_that_is_no_batch_fails_with_its_lines(tmp_path: Path, content: bytes, code: str) -> None:
    async with gate(settings=at(tmp_path, body_bytes=2000, batch_lines=8)) as gateway:
        asks = client(gateway)
        batch = await ended(asks, (await begin(asks, content)).id)
        assert batch.status == "failed" and batch.failed_at and batch.errors.data[0].code == code
        assert not gateway.engine.asked


def test_of_many_wrong_lines_a_hundred_are_told(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(jsonl(line("a")) + b"x\n" * 500)
    total, errors = check_lines(path, CHAT, Limits())
    assert total == 1 and [error.line for error in errors] == list(range(2, 102))


async def test_requests_that_ask_for_no_batch_are_refused_by_name(tmp_path: Path) -> None:
    async with gate(settings=at(tmp_path)) as gateway:
        asks = client(gateway)
        file = await asks.files.create(file=("in.jsonl", jsonl(line("a"))), purpose="batch")
        right: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        wrong = {"input_file_id": "file-no", "endpoint": "/v1/responses", "completion_window": "1h", "colour": "red",
                 "metadata": {"a": 1}, "output_expires_after": {"anchor": "created_at", "seconds": 5}}  # fmt: skip
        for name, value in wrong.items():
            response = await gateway.http.post("/v1/batches", json={**right, name: value})
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"].startswith(name)
        with pytest.raises(openai.BadRequestError, match="purpose must be batch"):
            await asks.files.create(file=("a", b"x"), purpose="vision")
        for form in ({"data": {"purpose": "batch"}, "files": {"other": b"x"}},
                     {"data": {"purpose": "batch", "what": "x"}, "files": {"file": b"x"}}):  # fmt: skip
            assert (await gateway.http.post("/v1/files", **form)).status_code == 400
        assert (await gateway.http.post("/v1/files", json={})).status_code == 415
        broken = {"content-type": "multipart/form-data; boundary=x"}
        assert (await gateway.http.post("/v1/files", content=b"--y", headers=broken)).status_code == 400
        with pytest.raises(openai.NotFoundError):
            await asks.batches.retrieve("batch_no")
        no_boundary = {"content-type": "multipart/form-data"}
        assert (await gateway.http.post("/v1/files", content=b"--y", headers=no_boundary)).status_code == 400
        # A page of another site may send a form without asking.
        form = {"data": {"purpose": "batch"}, "files": {"file": b"x"}}
        for foreign in ("http://evil.example", "http://[", "null", ""):
            assert (await gateway.http.post("/v1/files", headers={"origin": foreign}, **form)).status_code == 403
        own = {"origin": gateway.url}
        assert (await gateway.http.post("/v1/files", headers=own, **form)).status_code == 200


async def test_sizes_and_counts_are_bounded(tmp_path: Path) -> None:
    limits = {"file_bytes": 1000, "files": 3, "files_bytes": 2500, "batches": 1}
    async with gate(MemoryTransport(silent), at(tmp_path, **limits)) as gateway:
        asks = client(gateway)
        for size in (1001, 500_000):
            with pytest.raises((openai.APIStatusError, openai.APIConnectionError)) as told:
                await asks.files.create(file=("a", b"x" * size), purpose="batch")
            assert getattr(told.value, "status_code", 413) == 413
        first = await begin(asks, jsonl(line("a")))
        with pytest.raises(openai.RateLimitError):
            await asks.batches.create(input_file_id=first.input_file_id, endpoint=CHAT, completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="unfinished"):
            await asks.files.delete(first.input_file_id)
        await asks.files.create(file=("a", b"x" * 1000), purpose="batch")
        await asks.files.create(file=("a", b"x" * 1000), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="delete some"):
            await asks.files.create(file=("a", b"x"), purpose="batch")
    assert len(list(tmp_path.glob("files/file-*"))) == 6  # a record and a content each; nothing of what was refused


async def test_a_cancelled_batch_says_of_each_request_what_became_of_it(tmp_path: Path) -> None:
    async def one_answer(asked: Asked) -> AsyncIterator[Any]:
        if "r0" not in asked.request.strings["chat_request"]:
            await asyncio.Event().wait()
        yield piece("done", "stop")

    async with gate(MemoryTransport(one_answer), at(tmp_path, batch_requests_at_once=2)) as gateway:
        asks = client(gateway)
        made = await begin(asks, jsonl(*(line(f"r{n}") for n in range(6))))
        while (await asks.batches.retrieve(made.id)).request_counts.completed < 1:
            await asyncio.sleep(0.01)
        assert (await asks.batches.cancel(made.id)).status in ("cancelling", "cancelled")
        batch = await ended(asks, made.id)
        assert batch.status == "cancelled" and batch.cancelled_at and batch.cancelling_at
        assert [row["custom_id"] for row in await answers(asks, batch.output_file_id)] == ["r0"]
        errors = await answers(asks, batch.error_file_id)
        assert sorted(row["custom_id"] for row in errors) == [f"r{n}" for n in range(1, 6)]
        assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
        assert {asked.ended for asked in gateway.engine.asked[1:]} == {"cancelled"}
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            await asks.batches.cancel(made.id)


async def test_a_batch_whose_time_is_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashserve_gateway.batch.batches._WINDOW_S", 1)
    async with gate(MemoryTransport(silent), at(tmp_path)) as gateway:
        asks = client(gateway)
        batch = await ended(asks, (await begin(asks, jsonl(line("a")))).id)
        assert batch.status == "expired" and batch.expired_at
        [row] = await answers(asks, batch.error_file_id)
        assert row["error"]["code"] == "batch_expired"


async def test_full_engines_are_asked_again_and_one_that_a_request_ends_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_RETRY_S", (0.001, 0.002))
    full, asked_for = Unavailable("the queue is full", retry_after_ms=1), Counter[str]()

    async def engine(asked: Asked) -> AsyncIterator[Any]:
        name = asked.chat["messages"][0]["content"]
        asked_for[name] += 1
        if name == "poison" or asked_for[name] < 2 * job._MOST_TRIES:
            raise full if name == "patient" else Unavailable("the engine ended", retry_after_ms=1)
        yield piece("done", "stop")

    async with gate(MemoryTransport(engine), at(tmp_path)) as gateway:
        asks = client(gateway)
        batch = await ended(asks, (await begin(asks, jsonl(line("patient"), line("poison")))).id)
        assert [row["custom_id"] for row in await answers(asks, batch.output_file_id)] == ["patient"]
        [row] = await answers(asks, batch.error_file_id)
        assert row["response"]["status_code"] == 503
    assert asked_for == {"patient": 2 * job._MOST_TRIES, "poison": job._MOST_TRIES}


async def test_a_gateway_goes_on_where_another_ended(tmp_path: Path) -> None:
    """The first answers three requests and is stopped; its journal also ends with half a line."""

    async def three(asked: Asked) -> AsyncIterator[Any]:
        if asked.chat["messages"][0]["content"] > "r2":
            await asyncio.Event().wait()
        yield piece("first", "stop")

    lines = [line(f"r{n}") for n in range(9)]
    async with gate(MemoryTransport(three), at(tmp_path)) as gateway:
        asks = client(gateway)
        made = await begin(asks, jsonl(*lines))
        while (await asks.batches.retrieve(made.id)).request_counts.completed < 3:
            await asyncio.sleep(0.01)
    with (tmp_path / "files" / f"{job.journal_id(made.id, 'output')}.jsonl").open("ab") as journal:
        journal.write(b'{"id": "batch_req_1", "custom_id": "r7", "resp')
    (tmp_path / "files" / "file-1.part").write_bytes(b"half an upload")
    async with gate(MemoryTransport(says("second")), at(tmp_path)) as gateway:
        asks = client(gateway)
        batch = await ended(asks, made.id)
        assert batch.status == "completed" and batch.request_counts.completed == 9
        rows = await answers(asks, batch.output_file_id)
        texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}
        assert texts == {f"r{n}": "first" if n < 3 else "second" for n in range(9)}
        assert len(rows) == 9 and len(gateway.engine.asked) == 6
    assert not list(tmp_path.glob("files/*.part"))


async def test_a_journal_that_cannot_be_written_fails_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(journal: Journal, answer: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "add", full)
    async with gate(settings=at(tmp_path)) as gateway:
        asks = client(gateway)
        batch = await ended(asks, (await begin(asks, jsonl(line("a")))).id)
        assert batch.status == "failed" and batch.errors.data[0].code == "internal_error"
        assert (await gateway.chat()).status_code == 200


async def test_a_folder_is_one_gateways(tmp_path: Path) -> None:
    async with gate(settings=at(tmp_path)) as gateway:
        await client(gateway).files.create(file=("a", b"x"), purpose="batch")
        with pytest.raises(DataFolderError, match="another gateway"):
            create_app(at(tmp_path))
    (tmp_path / "batches" / "batch_1.json").write_text("{")
    with pytest.raises(DataFolderError, match=r"batch_1\.json"):
        create_app(at(tmp_path))


async def test_a_folder_that_cannot_be_made_is_named_with_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    async with gate(settings=at(tmp_path / "file" / "data")) as gateway:
        with pytest.raises(openai.InternalServerError, match="--data-dir") as raised:
            await begin(client(gateway), jsonl(line("a")))
        assert raised.value.code == "data_folder_unusable" and str(tmp_path) in str(raised.value)


async def test_a_disk_that_is_full_is_told_at_the_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_whole", full)
    async with gate(settings=at(tmp_path)) as gateway:
        with pytest.raises(openai.InternalServerError, match="No space left") as raised:
            await begin(client(gateway), jsonl(line("a")))
        assert raised.value.code == "data_folder_unusable"
        assert not list((tmp_path / "files").glob("*.jsonl"))


def test_a_file_and_its_name_are_both_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(records.os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    records.write_whole(tmp_path / "a.json", b"1")
    assert synced == [str(tmp_path / "a.json.new"), str(tmp_path)]
    assert (tmp_path / "a.json").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1


async def test_without_a_folder_there_are_none_and_nothing_is_made_before_a_file_comes(tmp_path: Path) -> None:
    async with gate() as gateway:
        assert (await gateway.http.get("/v1/files")).status_code == 404
    async with gate(settings=at(tmp_path / "later")) as gateway:
        assert (await gateway.http.get("/v1/batches")).json()["data"] == []
        assert not (tmp_path / "later").exists()


async def test_files_and_batches_are_their_keys_own(tmp_path: Path) -> None:
    keys = [new_key(name) for name in ("alice", "bob")]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{**entry, "requests_in_flight": 1, "tokens_per_minute": 10**6} for _, entry in keys]))
    settings = Settings(data_dir=tmp_path / "data", keys_file=path)
    async with gate(settings=settings) as gateway:
        alice, bob = (client(gateway, key) for key, _ in keys)
        batch = await ended(alice, (await begin(alice, jsonl(*(line(f"r{n}") for n in range(20))))).id)
        assert batch.request_counts.completed == 20  # its requests take none of the key's places
        assert [one.id async for one in alice.batches.list(limit=1)] == [batch.id]
        assert [one async for one in bob.batches.list()] == [] and [one async for one in bob.files.list()] == []
        for refused in (
            bob.batches.retrieve(batch.id), bob.batches.cancel(batch.id), bob.files.content(batch.output_file_id),
            bob.files.delete(batch.input_file_id),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                await refused
        with pytest.raises(openai.BadRequestError):
            await bob.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
        with pytest.raises(openai.AuthenticationError):
            await client(gateway).files.list()


def test_a_batch_leaves_its_key_half_of_its_tokens() -> None:
    now = [0.0]
    caller = Caller(Key("alice", "", tokens_per_minute=600, requests_in_flight=1), lambda: now[0])
    with caller.admit("demo", 1, 10), caller.admit("demo", 3, 400, in_background=True):  # no places, tokens enough
        with pytest.raises(Exception, match="per minute") as told, caller.admit("demo", 1, 1, in_background=True):
            pass
        assert told.value.retry_after_s == pytest.approx(11.1)  # 190 tokens are left, ten come in a second
