"""The chat page in a browser, over the whole service: pictures, several turns, streaming, stop, examples, no key.

It wants Chromium: `make browser`. The screenshots lie in out/page/.
"""

import inspect
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from serve.page import picture_part
from tests.engine.tiny import picture
from tests.serve.pictures import data_url
from tests.serve.running import KEY, ROOT, Service, application, driving, free_port, running, stats

pytestmark = pytest.mark.soak
SHOTS = ROOT / "out" / "page"


def test_a_path_that_is_no_upload_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("secret")
    for path in (str(file), "/etc/passwd", "../../../../etc/passwd"):
        with pytest.raises(ValueError, match="no uploaded file"):
            picture_part(path)


@pytest.fixture(scope="module")
def service(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port = free_port()
    page = {"name": "page", "import_path": "serve.page:build", "route_prefix": "/chat"}
    page["args"] = {"model": "tiny", "api": f"http://127.0.0.1:{port}/v1"}
    log = tmp_path_factory.mktemp("page") / "log"
    models = application("main", "/", checkpoint=str(artifact), cpus=0.25, max_answer=200)  # two turns have room
    with running(log, models, page, http={"port": port}) as service:
        deadline = time.monotonic() + 120
        while httpx.get(f"{service.url}/chat/").status_code != 200:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield service


@pytest.fixture(scope="module")
def driver(service: Service) -> Iterator[Executor]:
    with driving(service) as driver:
        yield driver


@pytest.fixture
def page(service: Service) -> Iterator[Page]:
    chromium = shutil.which("chromium")
    assert chromium, "Chromium is missing: make browser"
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(30_000)
        outside: list[str] = []
        page.on("request", lambda request: outside.append(request.url))
        page.goto(f"{service.url}/chat/")
        yield page
        page.unroute_all()
        browser.close()
        assert not [url for url in outside if not url.startswith((service.url, "data:", "blob:"))]


def image(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def ask(page: Page, text: str) -> None:
    box = page.locator(".multimodal-textbox textarea")
    box.fill(text)
    box.press("Enter")


def answers(page: Page) -> list[str]:
    return page.locator(".bot.message, .message.bot").all_inner_texts()


def wait_for_answers(page: Page, count: int) -> None:
    """Each is there, and the last one has ended: then the box takes another question."""
    page.wait_for_function(
        "count => document.querySelectorAll('.bot.message, .message.bot').length >= count", arg=count
    )
    expect(page.locator(".multimodal-textbox textarea")).to_be_enabled(timeout=30_000)


def letters(text: str | None) -> str:
    """What no Markdown takes away."""
    return "".join(filter(str.isalnum, text or ""))


def test_a_conversation(service: Service, page: Page, tmp_path: Path) -> None:
    page.get_by_label("API key").fill(KEY)
    page.locator("input[type=range]").fill("0")
    file = tmp_path / "digit.png"
    file.write_bytes(picture(3))
    page.locator("input[type=file]").first.set_input_files(file)
    expect(page.locator(".thumbnail-item, .thumbnail-image").first).to_be_visible()
    ask(page, "Which digit is in the picture?")
    wait_for_answers(page, 1)
    ask(page, "图片里是哪个数字？")
    wait_for_answers(page, 2)
    shown = answers(page)
    # The same two turns by the official client: the page sent the picture and what was said before.
    messages: list[Any] = []
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
        for content in (
            [image(picture(3)), {"type": "text", "text": "Which digit is in the picture?"}],
            "图片里是哪个数字？",
        ):
            messages.append({"role": "user", "content": content})
            reply = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
            content = inspect.cleandoc(reply.choices[0].message.content or "")  # as Gradio keeps it
            messages.append({"role": "assistant", "content": content})
    expected = [letters(one["content"]) for one in messages if one["role"] == "assistant"]
    assert list(map(letters, shown)) == expected
    assert all(expected)
    expect(page.locator(".user.message img, .message.user img").first).to_be_visible()
    page.screenshot(path=SHOTS / "conversation.png", full_page=True)


def test_a_picture_is_pasted(page: Page) -> None:
    page.get_by_label("API key").fill(KEY)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async url => {
            const blob = await (await fetch(url)).blob()
            await navigator.clipboard.write([new ClipboardItem({[blob.type]: blob})])
        }""",
        data_url(picture(5)),
    )
    page.locator(".multimodal-textbox textarea").press("Control+V")
    expect(page.locator(".thumbnail-item, .thumbnail-image").first).to_be_visible()
    ask(page, "Which digit?")
    wait_for_answers(page, 1)
    expect(page.locator(".user.message img, .message.user img").first).to_be_visible()


def test_stop_ends_the_generation(page: Page, driver: Executor) -> None:
    before = driver.submit(stats).result()
    page.get_by_label("API key").fill(KEY)
    page.locator("input[type=range]").fill("2")  # of random weights, the longest answers
    # Short answers leave no time to look for the button: the page presses it when the answer's first word is there.
    page.evaluate(
        """() => new MutationObserver(() => {
            const answers = [...document.querySelectorAll('.bot.message, .message.bot')].map(one => one.innerText)
            const stop = document.querySelector('.stop-button')
            if (stop && answers.length === window.asked && !/^(Loading content)?$/.test(answers.at(-1).trim())) {
                window.asked = null
                stop.click()
            }
        }).observe(document.body, {childList: true, subtree: true, characterData: true})"""
    )
    aborted = 0
    for asked in range(1, 11):  # a short answer has ended before anybody can stop it
        page.evaluate(f"window.asked = {asked}")
        ask(page, "Tell me everything about digits.")
        wait_for_answers(page, asked)
        deadline = time.monotonic() + 30
        while (after := driver.submit(stats).result())["running"] + after["waiting"]:
            assert time.monotonic() < deadline
        aborted, finished = (after[name] - before[name] for name in ("aborted", "finished"))
        assert aborted + finished == asked
        if aborted:
            break
    assert aborted
    stopped = answers(page)
    assert letters(stopped[-1])  # what came before Stop is kept
    ask(page, "And now?")
    wait_for_answers(page, asked + 1)
    *before_it, second = answers(page)
    assert before_it == stopped
    assert letters(second)
    page.screenshot(path=SHOTS / "stopped.png", full_page=True)


def test_an_example_with_a_picture(page: Page) -> None:
    page.get_by_label("API key").fill(KEY)
    page.get_by_text("What is in this picture?").first.click()
    wait_for_answers(page, 1)
    expect(page.locator(".user.message img, .message.user img").first).to_be_visible()


def test_without_a_key_the_page_says_so(page: Page) -> None:
    ask(page, "Hello")
    expect(page.get_by_text("The API key given is not known here.")).to_be_visible()
    page.screenshot(path=SHOTS / "no-key.png", full_page=True)
