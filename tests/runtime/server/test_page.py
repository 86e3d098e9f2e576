"""The chat page: what it asks for is served, nothing else is asked, and it works in a browser where one is there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import httpx2 as httpx
import pytest

from helpers.served import CHAT, Gated, serving
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.server import page
from merino_edge.runtime.server.app import Service
from merino_edge.tokenizer import Tokenizer

MOST_BYTES = 25_000
KEY = "sk-of-this-test"


@pytest.fixture(scope="module")
def gated(engine: Engine) -> Gated:
    return Gated(engine)


@pytest.fixture(scope="module")
def url(gated: Gated, tokenizer: Tokenizer) -> Iterator[str]:
    with serving(Service(gated, tokenizer, "small", waiting=8, key=KEY)) as url:  # type: ignore[arg-type]
        yield url


class Controls(HTMLParser):
    """The ids and labels of a page's controls."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.unlabelled: list[str] = []
        self._labels, self._is_in_label = set(re.findall(r'<label for="(\w+)"', text)), False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "label":
            self._is_in_label = True
        elif tag in ("input", "textarea") and not self._is_in_label and dict(attrs).get("id") not in self._labels:
            self.unlabelled.append(str(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._is_in_label &= tag != "label"


def test_the_page_needs_no_key_and_names_no_other_host(url: str) -> None:
    answer = httpx.get(url + "/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == page.text() and len(answer.content) < MOST_BYTES
    assert not re.search(r"//\w|\b(?:src|action)=|@import|url\(", answer.text)
    assert not Controls(answer.text).unlabelled
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2


def test_what_the_page_asks_for_is_served(url: str) -> None:
    asked = set(re.findall(r'\bapi\("([^"]*)"', page.text()))
    assert asked == {"v1/models", "metrics", CHAT.removeprefix("/")}
    for path in asked:
        assert httpx.get(f"{url}/{path}").status_code in (401, 405)  # it is there, and asks for the key or for POST
    assert httpx.get(f"{url}/v1/nothing").status_code == 404


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no browser is installed")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def test_a_browser_chats(url: str, browser: Any, gated: Gated) -> None:
    asked: list[str] = []
    problems: list[str] = []
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.set_default_timeout(10_000)
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda line: problems.append(line.text) if "Security" in line.text else None)
    tab.goto(url)
    tab.get_by_label("API key").fill(KEY)
    tab.get_by_role("button", name="Use this key").click()
    tab.get_by_role("heading", name="small").wait_for()
    tab.get_by_text("Settings", exact=True).click()
    for name, value in (("Temperature", "0"), ("Most tokens", "12")):
        tab.get_by_label(name).fill(value)
    tab.get_by_label("Message (Enter").fill("The quick <b>brown</b>")
    tab.keyboard.press("Enter")
    tab.get_by_text("tokens/s").wait_for()
    tab.get_by_text("MB of memory").wait_for()
    request = {"messages": [{"role": "user", "content": "The quick <b>brown</b>"}], "temperature": 0, "max_tokens": 12}
    expected = httpx.post(url + CHAT, json=request, headers={"Authorization": f"Bearer {KEY}"}).json()
    words = expected["choices"][0]["message"]["content"]
    paragraphs = tab.locator("#log article p")
    assert paragraphs.all_text_contents() == ["The quick <b>brown</b>", words]
    tab.get_by_role("button", name="Regenerate").click()
    tab.get_by_text("tokens/s").wait_for()
    assert paragraphs.all_text_contents() == ["The quick <b>brown</b>", words]
    gated.delay_s = 0.05
    tab.get_by_label("Most tokens").fill("400")
    tab.get_by_label("Message (Enter").fill("The quick")
    tab.keyboard.press("Enter")
    paragraphs.nth(3).filter(has_text=re.compile(r"\S")).wait_for()
    tab.keyboard.press("Escape")
    tab.get_by_text("Stopped.").wait_for()
    gated.delay_s = 0.0
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a phone"
    tab.get_by_role("button", name="New chat").click()
    assert paragraphs.count() == 0
    tab.reload()
    assert tab.get_by_label("Most tokens").input_value() == "400"  # settings stay
    assert not problems
    assert all(address.startswith((url, "data:")) for address in asked)
