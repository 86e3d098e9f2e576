"""OpenAI's client against the server: its answers, the queue, and clients that disconnect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import numpy as np
import openai
import pytest

from helpers.served import CHAT, HELLO, Gated, ask, greedy, sample, serving, wait_until
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server.app import Service
from merino_edge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def gated(bundle_path: Path) -> Iterator[Gated]:
    engine, _, _ = open_engine(bundle_path, threads=1)
    yield Gated(engine)
    engine.close()


@pytest.fixture(scope="module")
def url(gated: Gated, tokenizer: Tokenizer) -> Iterator[str]:
    with serving(Service(gated, tokenizer, "small", waiting=1, key=None)) as where:
        yield where


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


# --- answers ---


def test_a_chat_whole_or_streamed_is_the_answer_of_generate(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "The quick brown"}])
    expected = greedy(engine, tokenizer, ids, 20)
    whole = ask(client)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 20)
    assert whole.timings["generated_tokens"] == 20  # type: ignore[attr-defined]
    pieces = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == expected
    assert pieces[-2].choices[0].finish_reason == "length" and pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == 20
    assert pieces[-1].usage.prompt_tokens_details.cached_tokens == (len(ids) - 1) // 2 * 2


def test_a_plain_completion_takes_text_and_token_ids(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("fox jumps")
    expected = greedy(engine, tokenizer, ids, 8)
    for prompt in ("fox jumps", ["fox jumps"], ids):
        done = client.completions.create(model="small", prompt=prompt, temperature=0, max_tokens=8)
        assert done.choices[0].text == expected
    pieces = client.completions.create(model="small", prompt=ids, temperature=0, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected


def test_parts_stop_strings_bias_and_seed_reach_the_answer(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    text = ask(client).choices[0].message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": "The quick"}, {"type": "text", "text": " brown"}]}]
    request = {"model": "small", "messages": parts, "temperature": 0, "max_completion_tokens": 20}
    assert client.chat.completions.create(**request).choices[0].message.content == text
    cut = client.chat.completions.create(**request, stop=[text[3:5]]).choices[0]
    assert cut.message.content == text[: text.index(text[3:5])] and cut.finish_reason == "stop"
    wanted = tokenizer.encode("x")[0]
    forced = client.chat.completions.create(**{**request, "max_completion_tokens": 3}, logit_bias={str(wanted): 100})
    assert forced.choices[0].message.content == "xxx"
    hot = {**request, "temperature": 2, "extra_body": {"top_k": 0}, "top_p": 1}
    answers = [client.chat.completions.create(**hot, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_an_answer_follows_the_response_format(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
    }
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}}
    request = {"model": "small", "messages": HELLO, "temperature": 1.5, "max_tokens": 60}
    done = client.chat.completions.create(**request, response_format=form, seed=3).choices[0]
    assert done.finish_reason == "stop" and set(json.loads(done.message.content)) == {"n"}
    done = client.chat.completions.create(**request, extra_body={"regex": "(yes|no)"}).choices[0]
    assert done.finish_reason == "stop" and done.message.content in ("yes", "no")


def test_without_a_limit_an_answer_ends_at_the_context(client: openai.OpenAI, gated: Gated) -> None:
    done = client.completions.create(model="small", prompt="fox", temperature=0)
    assert done.choices[0].finish_reason == "length" and done.usage is not None
    assert done.usage.total_tokens == gated.max_positions + 1  # the last token is not in the cache


def test_models_health_and_metrics(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["small"] == [client.models.retrieve("small").id]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    before, text = sample(url, "merino_edge_generated_tokens_total"), httpx.get(f"{url}/metrics").text
    assert "merino_edge_first_token_seconds_bucket" in text
    ask(client)
    assert sample(url, "merino_edge_generated_tokens_total") == before + 20


# --- the queue and disconnected clients ---


@pytest.fixture
def paused(gated: Gated) -> Iterator[Gated]:
    """Steps wait until the test opens the gate."""
    gated.gate.clear()
    yield gated
    gated.failure, gated.delay_s = None, 0.0
    gated.gate.set()


def test_requests_beyond_the_queue_are_refused_and_the_others_answered(
    client: openai.OpenAI, url: str, paused: Gated, engine: Engine, tokenizer: Tokenizer
) -> None:
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(client).choices[0].message.content)) for _ in "12"]
    for thread in threads:
        thread.start()
    wait_until(lambda: sample(url, "merino_edge_pending_answers") == 2)
    with pytest.raises(openai.RateLimitError, match="2 answers are running or waiting") as refusal:
        ask(client)
    assert refusal.value.response.headers["retry-after"] == "1"
    paused.gate.set()
    for thread in threads:
        thread.join()
    ids = tokenizer.encode_chat([{"role": "user", "content": "The quick brown"}])
    assert answers == 2 * [greedy(engine, tokenizer, ids, 20)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_ends_its_own_answer_only(
    client: openai.OpenAI, url: str, paused: Gated, engine: Engine, tokenizer: Tokenizer, stream: bool
) -> None:
    before, paused.delay_s = paused.steps, 0.01
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url + CHAT, json={"model": "small", "messages": HELLO, "stream": stream}, timeout=0.3)
    wait_until(lambda: paused.steps == before + 1)  # its prefill waits at the gate
    paused.gate.set()
    wait_until(lambda: sample(url, "merino_edge_pending_answers") == 0)
    assert paused.steps < before + 50  # of the 300 that fit the context
    paused.delay_s = 0.0
    ids = tokenizer.encode_chat([{"role": "user", "content": "The quick brown"}])
    assert ask(client).choices[0].message.content == greedy(engine, tokenizer, ids, 20)


def test_a_hundred_cancelled_answers_leave_no_trace(bundle_path: Path, tokenizer: Tokenizer) -> None:

    def break_off(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0) as own_client:
            for _ in range(25):
                prompt = rng.integers(own.vocab_size, size=int(rng.integers(1, 300))).tolist()
                stream = own_client.completions.create(model="small", prompt=prompt, stream=True, seed=0)
                for _ in zip(range(int(rng.integers(0, 20))), stream, strict=False):
                    pass
                stream.close()

    own, _, _ = open_engine(bundle_path, threads=1)
    service = Service(own, tokenizer, "small", waiting=8, key=None)
    with serving(service) as where, openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0) as golden:
        expected = ask(golden).choices[0].message.content
        threads = [threading.Thread(target=break_off, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: sample(where, "merino_edge_pending_answers") == 0)
        assert ask(golden).choices[0].message.content == expected
    own.close()


def test_a_failing_engine_fails_one_answer_only(client: openai.OpenAI, paused: Gated) -> None:
    paused.gate.set()
    expected = ask(client).choices[0].message.content
    paused.failure = MemoryError()
    with pytest.raises(openai.InternalServerError, match="MemoryError"):
        ask(client)
    with pytest.raises(openai.APIError, match="MemoryError"):
        list(ask(client, stream=True))
    paused.failure = None
    assert ask(client).choices[0].message.content == expected
