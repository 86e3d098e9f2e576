"""What clients of the API send and read: fields that ask for nothing, classes of errors, cut and slow answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from helpers.served import CHAT, HELLO, TEXT, Gated, ask, sample, serving, wait_until
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server import answer as server_answer
from merino_edge.runtime.server.app import Service
from merino_edge.runtime.server.replies import error_document, error_event
from merino_edge.tokenizer import Tokenizer

GOOD: dict[str, Any] = {"model": "small", "messages": HELLO, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def gated(bundle_path: Path) -> Iterator[Gated]:
    engine, _, _ = open_engine(bundle_path, threads=1)
    with closing(engine):
        yield Gated(engine)


@pytest.fixture(scope="module")
def url(gated: Gated, tokenizer: Tokenizer) -> Iterator[str]:
    with serving(Service(gated, tokenizer, "small", waiting=3, key=None)) as where:
        yield where


@pytest.mark.parametrize("as_document", [True, False])
def test_a_client_may_send_back_what_it_was_sent(url: str, as_document: bool) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        message = ask(client).choices[0].message
        talk = [*HELLO, message.model_dump() if as_document else message, *HELLO]
        again = client.chat.completions.create(model="small", messages=talk, max_tokens=4)  # type: ignore[arg-type]
    assert again.choices[0].finish_reason == "length"


SILENT = {"role": "assistant", "content": None, "tool_calls": [], "function_call": None, "annotations": []}


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"tools": [], "tool_choice": None, "audio": None, "prediction": None, "web_search_options": None},
        {"reasoning_effort": "low", "verbosity": "medium", "cache_prompt": False, "metadata": {}},
        {"stream_options": {"include_usage": None}, "response_format": None, "logit_bias": {}, "stop": None},
        {"messages": [{**HELLO[0], "name": None, "audio": None, "reasoning_content": None}]},
    ],
)
def test_what_asks_for_nothing_changes_nothing(url: str, change: dict[str, Any]) -> None:
    plain, asked = (httpx.post(url + CHAT, json=body).json() for body in (GOOD, GOOD | change))
    assert asked["choices"] == plain["choices"], asked


def test_an_assistant_may_have_been_silent(url: str) -> None:
    answers = [
        httpx.post(url + CHAT, json=GOOD | {"messages": [*HELLO, silent, *HELLO]}).json()["choices"]
        for silent in (SILENT, {"role": "assistant", "content": ""})
    ]
    assert answers[0] == answers[1]


def test_the_one_model_need_not_be_named(url: str) -> None:
    assert httpx.post(url + TEXT, json={"prompt": "fox", "max_tokens": 2}).status_code == 200


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}


def test_what_a_schema_is_not_held_to_is_noted(url: str) -> None:
    schema = {"type": "string", "format": "colour", "maxLength": 3}
    answer = httpx.post(url + CHAT, json=GOOD | {"response_format": form(schema)})
    assert answer.json()["notes"] == ["the format 'colour' at # is not held"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "field"),
    [
        (CHAT, GOOD | {"temperature": "hot"}, 400, "invalid_value", "temperature"),
        (CHAT, GOOD | {"temperature": -1}, 400, "invalid_value", "temperature"),
        (CHAT, GOOD | {"wings": True}, 400, "unknown_parameter", "wings"),
        (CHAT, GOOD | {"functions": [{"name": "fly"}]}, 400, "unsupported_parameter", "functions"),
        (CHAT, GOOD | {"messages": [{"role": "user", "content": 1}]}, 400, "invalid_value", "messages.0.content.str"),
        (CHAT, GOOD | {"messages": HELLO * 100}, 400, "context_length_exceeded", None),
        (CHAT, GOOD | {"model": "large"}, 404, "model_not_found", "model"),
        ("/v1/images", GOOD, 404, "not_found", None),
        ("/v1/embeddings", {"input": "x"}, 400, "not_served", "embeddings"),
        (CHAT, GOOD | {"regex": "((("}, 400, "invalid_value", "regex"),
        (CHAT, GOOD | {"response_format": form({"not": {}}), "stream": True}, 400, "invalid_value", "response_format"),
    ],
)
def test_an_error_has_its_class(
    url: str, path: str, body: dict[str, Any], status: int, code: str | None, field: str | None
) -> None:
    answer = httpx.post(url + path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, field), error


def test_a_foreign_host_reads_what_to_do(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={"Host": "board.local"})
    assert answer.status_code == 400
    assert "--api-key" in answer.json()["error"]["message"]


def test_the_scheme_of_a_key_has_any_capitals(bundle_path: Path, tokenizer: Tokenizer) -> None:
    engine, _, _ = open_engine(bundle_path, threads=1)
    with closing(engine), serving(Service(engine, tokenizer, "small", waiting=1, key="sesame")) as where:
        read = {
            scheme: httpx.get(f"{where}/v1/models", headers={"Authorization": f"{scheme}sesame"}).status_code
            for scheme in ("Bearer ", "bearer ", "Basic ", "")
        }
    assert read == {"Bearer ": 200, "bearer ": 200, "Basic ": 401, "": 401}


def test_a_stream_that_waits_says_so_to_proxies(url: str, gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_answer, "PING_SECONDS", 0.01)
    gated.gate.clear()
    with httpx.stream("POST", url + CHAT, json=GOOD | {"stream": True}) as answer:
        assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-cache")
        lines = []
        for line in answer.iter_lines():
            if line == ": waiting":
                gated.gate.set()
            lines.append(line)
    assert ": waiting" in lines
    assert lines[-2] == "data: [DONE]"


def test_an_answer_that_the_server_cuts_is_no_answer(bundle_path: Path, tokenizer: Tokenizer) -> None:
    engine, _, _ = open_engine(bundle_path, threads=1)
    gated = Gated(engine)
    gated.gate.clear()
    service, answers = Service(gated, tokenizer, "small", waiting=3, key=None), dict[bool, httpx.Response]()

    def post(stream: bool) -> None:
        answers[stream] = httpx.post(where + CHAT, json=GOOD | {"stream": stream}, timeout=30)

    with closing(engine), serving(service) as where:
        threads = [threading.Thread(target=post, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sample(where, "merino_edge_pending_answers") == 2)
        service.cancel_all()
        late = httpx.post(where + CHAT, json=GOOD)
        gated.gate.set()
        for thread in threads:
            thread.join()
    *_, event, done = answers[True].text.strip().split("\n\n")
    errors = [answers[False].json(), late.json(), json.loads(event.removeprefix("data: "))]
    assert (answers[False].status_code, late.status_code, done) == (503, 503, "data: [DONE]")
    assert {error["error"]["code"] for error in errors} == {"stopping"}


def test_an_event_is_one_line_for_every_client() -> None:
    """U+2028 and others end a line for clients that use Python's `splitlines`."""
    text = "a\u2028b\u2029c\x85d\r\n\x0b\x1c"
    lines = error_event(error_document(text, "server_error")).splitlines()
    assert [line[:6] for line in lines] == ["data: ", "", "data: ", ""]
    assert json.loads(lines[0][6:])["error"]["message"] == text


def test_a_key_may_have_any_letters(gated: Gated, tokenizer: Tokenizer) -> None:
    with serving(Service(gated, tokenizer, "small", waiting=3, key="Schlüssel")) as where:
        for key, status in (("Schlüssel", 200), ("Schlussel", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{where}/v1/models", headers=headers).status_code == status
