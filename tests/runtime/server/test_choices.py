"""What a client may ask of an answer: log-probabilities, several answers, other ends, the text before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest

from helpers.served import CHAT, HELLO, TEXT, serving
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server.app import Service
from merino_edge.runtime.speculative.prompt_lookup import PromptLookup
from merino_edge.runtime.token_bytes import TokenBytes
from merino_edge.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"model": "small", "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def served(bundle_path: Path) -> Iterator[Engine]:
    engine, _, _ = open_engine(bundle_path, threads=1)
    with closing(engine):
        yield engine


@pytest.fixture(scope="module")
def client(served: Engine, tokenizer: Tokenizer) -> Iterator[openai.OpenAI]:
    with (
        serving(Service(served, tokenizer, "small", waiting=0, key=None)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(str(client.base_url).removesuffix("/v1/") + path, json=body)


def expected_logprobs(engine: Engine, ids: list[int]) -> np.ndarray:
    """The log-probabilities [T-1, V] after each id, from one run of all of them."""
    rows = [engine.forward(np.asarray(ids[:1]), 0).copy()]
    rows += [engine.forward(np.asarray([token]), at).copy() for at, token in enumerate(ids[1:-1], 1)]
    logits = np.array(rows, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


# --- log-probabilities ---


def test_a_chats_logprobs_are_the_models(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer) -> None:
    asked = GREEDY | {
        "messages": HELLO,
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 2,
        "seed": 1,
        "max_tokens": 12,
    }
    done = client.chat.completions.create(**asked).choices[0]
    entries = done.logprobs.content
    assert len(entries) == 12 and b"".join(bytes(e.bytes) for e in entries).decode(errors="replace").startswith(
        done.message.content[:5]
    )
    prompt = tokenizer.encode_chat(HELLO)
    vocabulary = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    row = expected_logprobs(engine, [*prompt, 0])[-1]
    best = np.argsort(-row)[:3]
    np.testing.assert_allclose([likely.logprob for likely in entries[0].top_logprobs], row[best], atol=1e-4)
    assert entries[0].logprob == pytest.approx(row[vocabulary[entries[0].token]], abs=1e-4)
    streamed = list(client.chat.completions.create(**asked, stream=True))
    assert [e for p in streamed if p.choices[0].logprobs for e in p.choices[0].logprobs.content] == entries
    plain = client.chat.completions.create(**{k: v for k, v in asked.items() if "logprobs" not in k}).choices[0]
    assert plain.message.content == done.message.content and plain.logprobs is None


def test_a_form_changes_no_logprob(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer) -> None:
    asked = GREEDY | {"prompt": "fox", "logprobs": 0, "regex": "[xyz]{3}", "logit_bias": {"5": 3}}
    choice = post(client, TEXT, asked).json()["choices"][0]
    token = tokenizer.encode(choice["text"][0])[0]
    row = expected_logprobs(engine, [*tokenizer.encode("fox"), 0])[-1]
    assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(row[token], abs=1e-4)


def test_a_scored_prompt_leaves_nothing_in_the_cache(client: openai.OpenAI) -> None:
    asked = GREEDY | {"prompt": "The quick brown fox jumps"}
    before = client.completions.create(**asked).choices[0].text
    post(client, TEXT, GREEDY | {"prompt": "Zwölf Boxkämpfer jagen Viktor quer", "echo": True, "max_tokens": 0})
    after = client.completions.create(**asked)
    assert after.choices[0].text == before and after.usage.prompt_tokens_details.cached_tokens == 0


def test_an_echoed_prompt_has_its_own_logprobs(client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer) -> None:
    """lm-eval's request: token ids, echo, one token more."""
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 6)
    asked = GREEDY | {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1}
    done = client.completions.create(**asked).choices[0]
    lp = done.logprobs
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset) == len(ids) + 1
    assert lp.token_logprobs[0] is None and done.text.startswith(tokenizer.decode(ids))
    rows = expected_logprobs(engine, ids)
    np.testing.assert_allclose(lp.token_logprobs[1:-1], rows[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    np.testing.assert_allclose([max(top.values()) for top in lp.top_logprobs[1:-1]], rows.max(-1), atol=1e-4)
    assert lp.text_offset == [len("".join(lp.tokens[:i])) for i in range(len(ids) + 1)]
    scored = client.completions.create(**asked | {"max_tokens": 0}).choices[0]
    assert scored.logprobs.token_logprobs == lp.token_logprobs[:-1] and scored.text == tokenizer.decode(ids)
    streamed = list(client.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].text for piece in streamed) == done.text
    assert [t for p in streamed if p.choices[0].logprobs for t in p.choices[0].logprobs.tokens] == lp.tokens
    without = {**asked, "echo": False}
    assert client.completions.create(**without).choices[0].text == done.text[len(scored.text) :]


def test_logprobs_of_zero_are_those_of_the_answer_alone(client: openai.OpenAI) -> None:
    done = client.completions.create(**GREEDY, prompt="fox", logprobs=0).choices[0]
    assert [list(top) for top in done.logprobs.top_logprobs] == [[token] for token in done.logprobs.tokens]
    assert len(done.logprobs.tokens) == 6


def test_guesses_change_no_logprob(bundle_path: Path, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    engine, _, _ = open_engine(bundle_path, threads=1)
    asked = GREEDY | {"prompt": "fox fox fox fox", "logprobs": 2, "max_tokens": 20}
    guessing = Service(engine, tokenizer, "small", waiting=0, key=None, proposer=PromptLookup())
    with closing(engine), serving(guessing) as url:
        choice = httpx.post(url + TEXT, json=asked).json()["choices"][0]
    expected = client.completions.create(**asked).choices[0]
    assert choice["text"] == expected.text
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], expected.logprobs.token_logprobs, atol=1e-4)


# --- several answers ---


def test_n_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    asked = GREEDY | {"messages": HELLO, "temperature": 1.5, "extra_body": {"top_k": 0}, "top_p": 1}
    done = client.chat.completions.create(**asked, n=3, seed=5)
    texts = [choice.message.content for choice in done.choices]
    assert [choice.index for choice in done.choices] == [0, 1, 2] and len(set(texts)) == 3
    alone = [client.chat.completions.create(**asked, seed=5 + i) for i in range(3)]
    assert texts == [answer.choices[0].message.content for answer in alone]
    assert done.usage.prompt_tokens == alone[0].usage.prompt_tokens and done.usage.completion_tokens == 18
    pieces = list(client.chat.completions.create(**asked, n=3, seed=5, stream=True))
    for i, text in enumerate(texts):
        mine = [piece.choices[0] for piece in pieces if piece.choices[0].index == i]
        assert "".join(choice.delta.content or "" for choice in mine) == text and mine[-1].finish_reason == "length"


def test_a_list_of_prompts_is_answered_in_its_order(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompts = ["The quick", "lazy dog"]
    alone = [client.completions.create(**GREEDY, prompt=prompt).choices[0].text for prompt in prompts]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for several in (prompts, ids, [prompts[0], ids[1]]):
        done = client.completions.create(**GREEDY, prompt=several, n=2, echo=True)
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in done.choices] == [prompts[i // 2] + alone[i // 2] for i in range(4)]
    stopped = client.completions.create(**GREEDY, prompt=prompts, stop=[text[2:4] for text in alone])
    assert all(choice.finish_reason == "stop" for choice in stopped.choices)


# --- ends ---


def test_other_tokens_end_an_answer(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked = GREEDY | {"prompt": "fox", "max_tokens": 12, "logprobs": 0}
    free = client.completions.create(**asked).choices[0]
    texts = {TokenBytes(tokenizer).text_of(i): i for i in range(tokenizer.vocab_size)}
    ids = [texts[token] for token in free.logprobs.tokens]
    end = next(token for i, token in enumerate(ids) if i > 1)
    first = ids.index(end)
    cut = post(client, TEXT, asked | {"stop_token_ids": [end]}).json()["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["logprobs"]["tokens"] == free.logprobs.tokens[:first]
    later = post(client, TEXT, asked | {"stop_token_ids": [end], "min_tokens": first + 2}).json()["choices"][0]
    assert len(later["logprobs"]["tokens"]) >= first + 2


def test_the_models_own_end_can_be_ignored(client: openai.OpenAI, bundle_path: Path, tokenizer: Tokenizer) -> None:
    asked = GREEDY | {"prompt": "fox", "max_tokens": 12, "logprobs": 0}
    engine, _, _ = open_engine(bundle_path, threads=1)
    first = client.completions.create(**asked).choices[0].logprobs.tokens[0]
    end = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == first)
    ending = tokenizer.with_chat(replace(tokenizer.chat, eos_token_ids=(end,)))
    with closing(engine), serving(Service(engine, ending, "small", waiting=0, key=None)) as url:
        choices = [
            httpx.post(url + TEXT, json=asked | more).json()["choices"][0]
            for more in ({}, {"ignore_eos": True}, {"min_tokens": 5}, {"ignore_eos": True, "regex": "[a-c]{2}"})
        ]
    ended, whole, later, formed = choices
    assert (ended["finish_reason"], ended["text"]) == ("stop", "")
    assert whole["finish_reason"] == "length" and len(whole["logprobs"]["tokens"]) == 12
    assert len(later["logprobs"]["tokens"]) >= 5 and later["text"][:3] == whole["text"][:3]
    assert formed["finish_reason"] == "stop" and len(formed["text"]) == 2


# --- the assistant's own beginning ---


def test_the_assistants_last_message_goes_on(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    talk = [*HELLO, {"role": "assistant", "content": "fox jumps"}]
    rendered = tokenizer.apply_template(HELLO) + "fox jumps"
    expected = client.completions.create(**GREEDY, prompt=rendered)
    for more in (
        {},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        done = client.chat.completions.create(**GREEDY, messages=talk, extra_body=more)
        assert done.choices[0].message.content == expected.choices[0].text
        assert done.usage.prompt_tokens == expected.usage.prompt_tokens
    fresh = client.chat.completions.create(**GREEDY, messages=talk, extra_body={"continue_final_message": False})
    assert fresh.usage.prompt_tokens == len(tokenizer.encode_chat(talk))


@pytest.mark.parametrize(
    ("path", "change", "field"),
    [
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [*HELLO, *2 * [{"role": "assistant", "content": "x"}]]}, "messages"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids"),
        (CHAT, {"min_tokens": -1}, "min_tokens"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (TEXT, {"prompt": [[]]}, "prompt"),
        (TEXT, {"prompt": [999999]}, "prompt"),
        (TEXT, {"prompt": "x", "logprobs": -1}, "logprobs"),
    ],
)
def test_what_does_not_go_together_is_refused(
    client: openai.OpenAI, path: str, change: dict[str, Any], field: Any
) -> None:
    body = GREEDY | ({"messages": HELLO} if path == CHAT else {}) | change
    answer = post(client, path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_every_answer_has_an_id_and_a_fingerprint(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(**GREEDY, messages=HELLO, extra_headers={"x-request-id": "mine-1"})
    assert done._request_id == "mine-1" and done.system_fingerprint.startswith("fp_")
    made = {post(client, CHAT, GREEDY | {"messages": []}).headers["x-request-id"] for _ in "12"}
    assert len(made) == 2
    url = str(client.base_url).removesuffix("/v1/")
    assert httpx.get(f"{url}/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")
