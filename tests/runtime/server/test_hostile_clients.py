"""Clients that send half a request, leave in the middle of one, or ask for more than the server can give."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from helpers import small_tokenizers
from helpers.served import CHAT, HELLO, TEXT, Gated, sample, serving, wait_until
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server import bodies, connections
from merino_edge.runtime.server.app import Service
from merino_edge.tokenizer import ChatFormat, Tokenizer

GOOD = {"model": "small", "prompt": "fox", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def gated(bundle_path: Path) -> Iterator[Gated]:
    engine, _, _ = open_engine(bundle_path, threads=1)
    yield Gated(engine)
    engine.close()


@pytest.fixture(scope="module")
def service(gated: Gated, tokenizer: Tokenizer) -> Service:
    return Service(gated, tokenizer, "small", waiting=1, key=None)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with serving(service) as where:
        yield where


def connected(url: str, sent: bytes) -> socket.socket:
    """A connection that has sent these bytes."""
    opened = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    opened.sendall(sent)
    return opened


def head(length: int) -> bytes:
    return (
        f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_a_connection_whose_request_does_not_arrive_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (b"", b"GET /health HT", whole + b"GET /hea"):
        with connected(url, sent) as opened:
            received = b""
            while chunk := receive(opened):
                received += chunk
            assert received.startswith(b"HTTP/1.1 200") == sent.startswith(whole)


def receive(opened: socket.socket) -> bytes:
    try:
        return opened.recv(1 << 16)
    except ConnectionResetError:
        return b""


def test_a_body_that_does_not_arrive_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
    with connected(url, head(100) + b"{") as opened:
        assert opened.recv(1 << 16).startswith(b"HTTP/1.1 408")
        assert receive(opened)[:0] == b""
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_within_its_body_prints_nothing(
    url: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = sample(url, f'merino_edge_requests_total{{path="{TEXT}",status="400"}}')
    with connected(url, head(100) + b"{"):
        pass
    wait_until(lambda: sample(url, f'merino_edge_requests_total{{path="{TEXT}",status="400"}}') == before + 1)
    assert "Traceback" not in capfd.readouterr().err and not caplog.records


def test_connections_that_wait_make_room_for_others(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them are within a head, half within a body. The oldest are closed, and every new client is answered."""
    monkeypatch.setattr(connections, "most_connections", lambda: 8)
    with httpx.Client() as client:
        idle = [connected(url, b"GET /he" if i % 2 else head(9) + b"{") for i in range(40)]
        for _ in range(3):
            assert client.get(f"{url}/health").status_code == 200
            idle += [connected(url, b"GET /he") for _ in range(8)]
        assert receive(idle[0]) == b""
        for opened in idle:
            opened.close()
    assert connections.most_connections() == 8


def test_connections_take_half_of_the_handles_at_most() -> None:
    assert 0 < connections.most_connections() <= connections.MAX_CONNECTIONS


def test_prompts_are_not_encoded_for_more_requests_than_may_wait(
    url: str, gated: Gated, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = [], threading.Event()
    encode = Tokenizer.encode

    def slow(self: Tokenizer, text: str) -> list[int]:
        entered.append(text)
        assert gate.wait(20)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(httpx.post(url + TEXT, json=GOOD, timeout=20).status_code))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: sample(url, "merino_edge_pending_answers") == 2)
    refused = httpx.post(url + TEXT, json=GOOD)
    assert refused.status_code == 429 and "2 answers are running or waiting" in refused.text
    assert httpx.get(f"{url}/health").status_code == 200 and len(entered) == 1  # one at a time is encoded
    gate.set()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200] and sample(url, "merino_edge_pending_answers") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"logit_bias": {"9" * 5_000: 1}},
        {"logit_bias": {"٣": 1}},
        {"logit_bias": {"-1": 1}},
        {"seed": 10**4_000},
        {"max_tokens": 10**4_000},
        {"top_k": 10**400},
        {"prompt": [10**400]},
        {"prompt": [0] * 100_000},
        {"temperature": 10**300},
        {"model": "x" * 10_000},
    ],
)
def test_huge_numbers_are_a_client_s_mistake(url: str, change: dict[str, Any]) -> None:
    answer = httpx.post(url + TEXT, json=GOOD | change)
    assert answer.status_code == (404 if "model" in change else 400), answer.text[:200]
    assert answer.json()["error"]["message"]
    assert sample(url, "merino_edge_pending_answers") == 0


@pytest.mark.parametrize("digits", [4_299, 4_301, 100_000])
def test_numbers_with_many_digits_are_refused_in_json(url: str, digits: int) -> None:
    body = json.dumps(GOOD)[:-1] + f', "seed": {"9" * digits}}}'
    answer = httpx.post(url + TEXT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_the_engine_s_thread_outlives_a_panic(url: str, gated: Gated) -> None:
    class Panic(BaseException):
        pass

    gated.failure = Panic("boom")
    try:
        for _ in range(4):
            answer = httpx.post(url + TEXT, json=GOOD)
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    finally:
        gated.failure = None
    assert httpx.post(url + TEXT, json=GOOD).status_code == 200
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_health_tells_that_the_engine_s_thread_has_ended(bundle_path: Path, tokenizer: Tokenizer) -> None:
    engine, _, _ = open_engine(bundle_path, threads=1)
    service = Service(engine, tokenizer, "small", waiting=1, key=None)
    with serving(service) as where:
        assert httpx.get(f"{where}/health").status_code == 200
        service.close()
        dead = httpx.get(f"{where}/health")
        assert dead.status_code == 503 and "ended" in dead.json()["status"]
    engine.close()


def test_a_template_that_takes_too_long_is_an_error_of_the_server(bundle_path: Path, tokenizer: Tokenizer) -> None:
    engine, _, _ = open_engine(bundle_path, threads=1)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    endless = tokenizer.with_chat(ChatFormat(chat_template=loops))
    with serving(Service(engine, endless, "small", waiting=1, key=None)) as where:
        answer = httpx.post(where + CHAT, json={"model": "small", "messages": HELLO}, timeout=20)
        assert answer.status_code == 500 and "chat template failed" in answer.text
        assert httpx.post(where + TEXT, json=GOOD).status_code == 200
    engine.close()


def test_what_a_template_makes_of_messages_is_the_client_s_to_know(engine: Engine, tokenizer: Tokenizer) -> None:
    """Its refusal is 400 in its own words. A system message that it leaves out is said. Special tokens are text."""
    refusing = "{% if messages | length > 2 %}{{ raise_exception('Only one question.') }}{% endif %}"
    template = refusing + "{{ messages[-1].content }}"
    service = Service(engine, tokenizer.with_chat(ChatFormat(chat_template=template)), "small", waiting=1, key=None)
    request = {"model": "small", "max_tokens": 1, "messages": [{"role": "system", "content": "Be brief."}, *HELLO]}
    with serving(service) as where:
        refused = httpx.post(where + CHAT, json={**request, "messages": HELLO * 3})
        assert refused.status_code == 400 and "conversation: Only one question.;" in refused.json()["error"]["message"]
        noted = httpx.post(where + CHAT, json=request).json()
        assert noted["notes"] == ["the chat template leaves the system message out"]
        events = httpx.post(where + CHAT, json={**request, "stream": True}).text
        assert events.count("leaves the system message out") == 1
        assert "notes" not in httpx.post(where + CHAT, json={**request, "messages": HELLO}).json()
        spelled = {**request, "messages": [{"role": "user", "content": "fox<|im_end|>"}]}
        assert (
            httpx.post(where + CHAT, json=spelled).json()["usage"]["prompt_tokens"] > len(tokenizer.encode("fox")) + 1
        )


def test_the_server_does_not_log_bad_requests(service: Service) -> None:
    assert isinstance(connections.config(service.application()), uvicorn.Config)


def test_a_completion_keeps_its_first_space(engine: Engine) -> None:
    """SentencePiece begins every text with a space, which is part of a continuation and none of an answer."""
    chat = ChatFormat(chat_template="{{ messages[0].content }}")
    sentencepiece = Tokenizer(small_tokenizers.sentencepiece(), chat)
    the = str(sentencepiece.backend.token_to_id("▁the"))
    request = {"model": "small", "max_tokens": 2, "temperature": 0, "logit_bias": {the: 100.0}}
    with serving(Service(engine, sentencepiece, "small", waiting=1, key=None)) as where:
        whole = httpx.post(where + TEXT, json={**request, "prompt": "is"}).json()["choices"][0]["text"]
        events = httpx.post(where + TEXT, json={**request, "prompt": "is", "stream": True}).text
        streamed = [json.loads(line[6:])["choices"] for line in events.splitlines() if line.startswith('data: {"')]
        answer = httpx.post(where + CHAT, json={**request, "messages": HELLO}).json()["choices"][0]["message"]
    assert whole == "".join(choice["text"] for choices in streamed for choice in choices) == " the the"
    assert answer["content"] == "the the"
