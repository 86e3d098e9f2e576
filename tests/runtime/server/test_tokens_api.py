"""Token ids over HTTP, in the forms of vLLM and llama.cpp."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from helpers.served import HELLO, serving, wait_until
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server.app import Service
from merino_edge.runtime.server.tokens_api import TokensApi
from merino_edge.tokenizer import Tokenizer

WORDS = "The quick fox 🦊 déjà"


@pytest.fixture(scope="module")
def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer.with_chat(replace(tokenizer.chat, bos_token_id=0))


@pytest.fixture(scope="module")
def service(bundle_path: Path, with_bos: Tokenizer) -> Iterator[Service]:
    engine, _, _ = open_engine(bundle_path, threads=1)
    with closing(engine):
        yield Service(engine, with_bos, "small", waiting=0, key=None)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with serving(service) as where:
        yield where


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_texts_become_ids_and_texts_again(url: str, with_bos: Tokenizer) -> None:
    ids = with_bos.encode(WORDS)
    vllm = ask(url, "/tokenize", model="small", prompt=WORDS)
    assert (vllm["tokens"], vllm["count"], vllm["max_model_len"]) == (ids, len(ids), 320)
    assert ask(url, "/tokenize", prompt=WORDS, add_special_tokens=False)["tokens"] == ids[1:]
    assert ask(url, "/tokenize", content=WORDS)["tokens"] == ids[1:]
    assert ask(url, "/tokenize", content=WORDS, add_special=True)["tokens"] == ids
    for name in ("prompt", "content"):  # vLLM's and llama.cpp's
        assert ask(url, "/detokenize", tokens=ids[1:])[name] == WORDS
    assert ask(url, "/tokenize", content="")["tokens"] == ask(url, "/detokenize", tokens=[]).get("tokens", [])


def test_each_token_has_its_bytes(url: str) -> None:
    pieces = [token["piece"] for token in ask(url, "/tokenize", content=WORDS, with_pieces=True)["tokens"]]
    assert b"".join(bytes(p) if isinstance(p, list) else p.encode() for p in pieces).decode() == WORDS
    strings = ask(url, "/tokenize", prompt=WORDS, add_special_tokens=False, return_token_strs=True)["token_strs"]
    assert [p for p in pieces if isinstance(p, str)] == [s for s in strings if not s.startswith("bytes:")]


def test_a_conversation_is_its_prompt(url: str, with_bos: Tokenizer) -> None:
    assert ask(url, "/tokenize", messages=HELLO)["tokens"] == with_bos.encode_chat(HELLO)
    rendered = with_bos.decode(with_bos.encode_chat(HELLO), skip_special_tokens=False)
    assert ask(url, "/apply-template", messages=HELLO) == {"prompt": rendered}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "content": "b"}, 400),
        ("/tokenize", {"content": "a", "parse_special": False}, 400),
        ("/tokenize", {"prompt": "a", "model": "large"}, 404),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [10**9]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/apply-template", {"messages": []}, 400),
    ],
)
def test_what_cannot_be_is_refused(url: str, path: str, body: dict[str, Any], status: int) -> None:
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == status and answer.json()["error"]["message"], answer.text


def test_the_model_says_how_much_it_holds(url: str, with_bos: Tokenizer) -> None:
    for root in ("/v1", ""):
        card = httpx.get(f"{url}{root}/models").json()["data"][0]
        assert card["max_model_len"] == card["meta"]["n_ctx_train"] == 320
        assert card["meta"]["n_vocab"] == with_bos.vocab_size


def test_too_many_texts_at_once_are_refused(url: str, service: Service) -> None:
    """Each holds its text in memory while it waits."""
    statuses: list[int] = []

    def tokenize() -> None:
        statuses.append(httpx.post(f"{url}/tokenize", json={"content": "x"}, timeout=30).status_code)

    most = TokensApi.most_at_once
    threads = [threading.Thread(target=tokenize) for _ in range(most + 2)]
    turn = threading.Event()
    service._preparing.submit(turn.wait)  # nobody else's comes
    for thread in threads:
        thread.start()
    wait_until(lambda: len(statuses) == 2)
    turn.set()
    assert statuses == [429, 429]
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * most + [429, 429]
    assert ask(url, "/tokenize", content="x")["count"] == 1
