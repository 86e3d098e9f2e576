"""Invalid requests get a clear error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from helpers.served import CHAT, HELLO, TEXT, ask, serving
from merino_edge import limits
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server import requests
from merino_edge.runtime.server.app import Service
from merino_edge.runtime.server.chat_request import ChatRequest
from merino_edge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def url(bundle_path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    own, _, _ = open_engine(bundle_path, threads=1)
    with serving(Service(own, tokenizer, "small", waiting=1, key=None)) as where:
        yield where
    own.close()


GOOD = {"model": "small", "messages": HELLO, "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text"),
        ({"messages": HELLO * (limits.MAX_MESSAGES + 1)}, "messages"),
        ({"messages": HELLO * 100}, "context of this bundle is 320"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop string is empty"),
        ({"stop": ["a"] * 65}, "65 stop strings"),
        ({"n": 0}, "n: outside 1 to"),
        ({"best_of": 2}, "best_of: not served"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "does not read 'enable_thinking'"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "json_object", "schema": {"type": "wings"}}}, "Invalid type: wings"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wings"}}}},
            "the JSON schema cannot be used: Invalid type: wings",
        ),
        ({"regex": "((("}, "this regular expression cannot be used"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "cannot be combined"),
        ({"regex": "a" * (limits.MAX_GRAMMAR_CHARACTERS + 1)}, "characters"),
        ({"wings": True}, "wings"),
        ({"messages": [{"role": "user", "content": ""}], "model": 5}, "model"),
    ],
)
def test_an_invalid_value_is_refused_by_name(url: str, change: dict[str, Any], expected: str) -> None:
    answer = httpx.post(url + CHAT, json=GOOD | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert expected in error["message"] and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'{"model": "small", "prompt": "\xff"}', 400),
        (b'{"model": "small", "prompt": "\\ud800"}', 400),
        (b'{"model": "small", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "small", "prompt": "x", "temperature": 1e999}', 400),
        (b'{"model": "small", "prompt": ""}', 400),
        (b'{"model": "small", "prompt": ["a", 1]}', 400),
        (b'{"model": "small", "prompt": []}', 400),
        (b'{"model": "small", "prompt": ["a", ""]}', 400),
        (b'{"model": "small", "prompt": [[1], [999999]]}', 400),
        (b'{"model": "small", "prompt": "x", "stop_token_ids": [999999]}', 400),
        (b'{"model": "small", "prompt": "x", "max_tokens": 0}', 400),
        (b'{"model": "small", "prompt": "x", "logprobs": 99}', 400),
        (b'{"model": "small", "prompt": "x", "n": 257}', 400),
        (b'{"model": "small", "prompt": [-1]}', 400),
        (b'{"model": "small", "prompt": [1, "b"]}', 400),
        (b'{"model": "other", "prompt": "x"}', 404),
        (b"[" * 100_000, 400),
        (b'{"model": "small", "prompt": "' + b"x" * (limits.MAX_PROMPT_BYTES + 1) + b'"}', 400),
        (b" " * (limits.MAX_REQUEST_BYTES + 1), 413),
    ],
)
def test_an_invalid_body_is_refused(url: str, body: bytes, status: int) -> None:
    answer = httpx.post(url + TEXT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text[:200]
    assert answer.json()["error"]["message"]


def test_a_web_page_cannot_ask(url: str) -> None:
    body = json.dumps({"model": "small", "prompt": "x"}).encode()
    assert httpx.post(url + TEXT, content=body, headers={"Content-Type": "text/plain"}).status_code == 415
    named = {"Content-Type": "application/json", "Host": "evil.example"}
    assert httpx.post(url + TEXT, content=body, headers=named).status_code == 400
    port = url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert httpx.get(f"{url}/health", headers={"Host": host}).status_code == 200
    assert httpx.get(url + TEXT).status_code == 405
    assert httpx.get(f"{url}/etc/passwd").status_code == 404


def test_a_key_is_required_where_one_is_set(bundle_path: Path, tokenizer: Tokenizer) -> None:
    own, _, _ = open_engine(bundle_path, threads=1)
    with serving(Service(own, tokenizer, "small", waiting=1, key="sesame")) as where:
        assert httpx.get(f"{where}/health").status_code == 200
        for path in ("/metrics", "/v1/models", "/v1/models/small"):
            assert httpx.get(where + path).status_code == 401
        wrong = openai.OpenAI(base_url=f"{where}/v1", api_key="Sesame", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError, match="API key"):
            ask(wrong)
        with openai.OpenAI(base_url=f"{where}/v1", api_key="sesame", max_retries=0) as right:
            assert ask(right).choices[0].finish_reason == "length"
    own.close()


def test_a_requests_template_options_come_before_the_servers(tokenizer: Tokenizer) -> None:
    template = "{{ messages[0].content }}{{ mode }}{{ other }}"
    asked = tokenizer.with_chat(dataclasses.replace(tokenizer.chat, chat_template=template, bos_token_id=None))
    request = requests.parse(ChatRequest, json.dumps(GOOD | {"chat_template_kwargs": {"mode": "b"}}).encode())
    ids = request.prompts(asked, options={"mode": "a", "other": "c"})[0]
    assert ids == asked.encode(HELLO[0]["content"] + "bc")
