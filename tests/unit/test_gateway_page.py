"""The page: its files, its figures, and in a browser, where there is one, what a user does with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flashserve_gateway.settings import Settings
from gateway_peers import Gate, MemoryTransport, endless, gate, says

METRICS = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model="demo",engine="a"} 3
vllm:num_requests_running{model="demo",engine="b"} 1
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model="demo",engine="a"} 120
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{model="demo",le="0.01"} 5
vllm:time_to_first_token_seconds_bucket{model="demo",le="+Inf"} 10
vllm:time_to_first_token_seconds_sum{model="demo"} 1
vllm:time_to_first_token_seconds_count{model="demo"} 10
# TYPE nv_other gauge
nv_other{model="other"} 5
"""


@contextlib.asynccontextmanager
async def metrics_server(asked: list[bytes]) -> AsyncIterator[str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(METRICS)}\r\nConnection: close\r\n\r\n"
        writer.write((head + METRICS).encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_the_page_and_its_files_come_from_here_and_so_does_all_that_they_need():
    async with gate() as gateway:
        page = await gateway.http.get("/")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        files = [part.split('"')[0] for part in page.text.split('"static/')[1:]]
        assert len(files) == 3
        for name in (*files, "chat.js", "api.js", "markdown.js", "operations.js"):
            assert (await gateway.http.get(f"/static/{name}")).status_code == 200
        for name in ("none", "..%2fapp.py", "%2e%2e/app.py"):
            assert (await gateway.http.get(f"/static/{name}")).status_code == 404


async def test_the_endpoints_are_described_on_a_page_that_loads_nothing():
    async with gate() as gateway:
        page = await gateway.http.get("/docs")
        assert "POST /v1/chat/completions" in page.text and "max_tokens (optional)" in page.text
        assert not re.search(r"<script|<link|<img|src=|https?://", page.text)
        assert page.headers["content-security-policy"].startswith("default-src 'none'")


async def test_figures_are_summed_over_engines_and_asked_for_once_a_second():
    asked: list[bytes] = []
    async with metrics_server(asked) as address, gate(settings=Settings(triton_metrics=(address,))) as gateway:
        answers = await asyncio.gather(*(gateway.http.get("/operations") for _ in range(5)))
        models = answers[0].json()["models"]
        assert set(models) == {"demo"}
        assert (models["demo"]["running"], models["demo"]["generated"]) == (4, 120)
        assert models["demo"]["ttft"] == [[0.01, 5], [None, 10]]
        assert len(asked) == 1


async def test_without_figures_the_page_says_so():
    async with gate() as gateway:
        answer = (await gateway.http.get("/operations")).json()
        assert answer["models"] == {} and "--triton-metrics" in answer["note"]
    async with gate(settings=Settings(triton_metrics=("127.0.0.1:1",))) as gateway:
        assert (await gateway.http.get("/operations")).status_code == 200


# --- in a browser ------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
ANSWER = (
    "# Title\n\n",
    "A **bold** word and `code`.\n\n",
    "```python\ndef f():\n",
    "    return 1\n```\n\n",
    "- one\n- two\n",
)
SIZES = ((1280, 800), (390, 844))


@contextlib.asynccontextmanager
async def browser_page(gateway: Gate) -> AsyncIterator[Any]:
    """The page in a new browser; fails if its console has an error at the end."""
    playwright = pytest.importorskip("playwright.async_api", reason="pip install 'flashserve[browser]'")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt install chromium")
    async with playwright.async_playwright() as program:
        browser = await program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        await page.goto(gateway.url)
        await page.wait_for_function("document.querySelector('#model').options.length > 0")
        yield page
        await browser.close()
        assert not errors


async def ask(page: Any, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def test_an_answer_is_streamed_and_formatted_at_every_size_in_both_themes():
    async with gate(MemoryTransport(says(*ANSWER))) as gateway, browser_page(gateway) as page:
        await ask(page, "hello <b>there</b>")
        await page.get_by_text("5 tokens").wait_for()
        text = page.locator(".theirs .text")
        assert await text.locator("h2").inner_text() == "Title"
        assert await text.locator("strong").inner_text() == "bold"
        assert await text.locator("pre").inner_text() == "def f():\n    return 1"
        assert await text.locator("li").count() == 2
        assert await page.locator(".mine .text").inner_text() == "hello <b>there</b>"
        for width, height in SIZES:
            await page.set_viewport_size({"width": width, "height": height})
            assert await page.evaluate("document.documentElement.scrollWidth") == width
            assert await page.get_by_role("button", name="Send").is_visible()
        colors = set()
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            await page.locator(f":root[data-theme={scheme}]").wait_for()
            colors.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(colors) == 2


async def test_what_a_model_writes_is_never_run():
    evil = '<img src=x onerror="document.title=1"> [a](javascript:alert(1)) <script>document.title=1</script>'
    async with gate(MemoryTransport(says(evil))) as gateway, browser_page(gateway) as page:
        await ask(page, "hello")
        await page.get_by_text("1 tokens").wait_for()
        assert await page.locator(".theirs .text").inner_text() == evil
        assert await page.locator(".theirs .text a, .theirs .text img").count() == 0


async def test_stop_edit_regenerate_and_settings():
    async with gate(MemoryTransport(endless)) as gateway, browser_page(gateway) as page:
        await page.get_by_label("System prompt").fill("be brief")
        await page.get_by_label("Temperature").fill("0.5")
        await ask(page, "hello")
        await page.get_by_text("xxx").wait_for()
        await page.get_by_role("button", name="Stop").click()
        await page.get_by_text("stopped ·").wait_for()
        assert await gateway.ended() == "cancelled"
        first = gateway.engine.asked[0]
        assert first.sampling["temperature"] == 0.5 and first.sampling["max_tokens"] == 256
        assert [message["role"] for message in first.chat["messages"]] == ["system", "user"]

        gateway.engine.script = says("again")
        await page.get_by_role("button", name="Regenerate").click()
        await page.get_by_text("again").wait_for()
        await page.get_by_role("button", name="Edit").click()
        assert await page.locator("#messages li").count() == 0
        await ask(page, "goodbye")
        await page.get_by_text("again").wait_for()
        assert gateway.engine.asked[-1].chat["messages"][-1]["content"] == "goodbye"
        await page.reload()
        await page.get_by_text("goodbye").wait_for()  # the conversation stays in the browser
        assert json.loads(await page.evaluate("localStorage['flashserve.chat']"))[0]["content"] == "goodbye"
        await page.get_by_role("button", name="New chat").click()
        assert await page.locator("#messages li").count() == 0


async def test_figures_are_shown_live():
    async with (
        metrics_server([]) as address,
        gate(settings=Settings(triton_metrics=(address,))) as gateway,
        browser_page(gateway) as page,
    ):
        await page.get_by_role("button", name="Operations").click()
        await page.get_by_role("heading", name="demo").wait_for()
        tile = page.locator(".tiles div", has_text="Running").first
        assert (await tile.inner_text()).split() == ["Running", "4"]
        assert await page.get_by_role("img").count() == 2
