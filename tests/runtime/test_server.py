"""OpenAI's own client against the server, and what strangers send it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import uvicorn

from merino_edge import limits
from merino_edge.runtime.engine import Engine, open_engine
from merino_edge.runtime.generation import Session, generate
from merino_edge.runtime.sampling import Sampling
from merino_edge.runtime.server.app import Service
from merino_edge.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "The quick brown"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE_SECONDS = 20


class Gated:
    """A real engine whose steps wait for a gate, so that a test can look at an answer that is being made."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.vocab_size = engine, engine.vocab_size
        self.max_positions, self.max_rows = engine.max_positions, engine.max_rows
        self.gate, self.steps, self.delay_s, self.failure = threading.Event(), 0, 0.0, None
        self.gate.set()

    def forward(self, tokens: np.ndarray, start: int) -> np.ndarray:
        return self.forward_rows(tokens, start, 1)[0]

    def forward_rows(self, tokens: np.ndarray, start: int, rows: int) -> np.ndarray:
        self.steps += 1
        assert self.gate.wait(PATIENCE_SECONDS)
        time.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure
        return self._engine.forward_rows(tokens, start, rows)

    def assume(self, positions: int) -> None:
        self._engine.assume(positions)

    def close(self) -> None:
        self._engine.close()


@contextmanager
def serving(service: Service) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(service.application(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        service.cancel_all()
        server.should_exit = True
        thread.join()
        service.close()


def wait_until(true: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < PATIENCE_SECONDS
        time.sleep(0.005)


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


def greedy(engine: Engine, tokenizer: Tokenizer, ids: list[int], count: int) -> str:
    return "".join(generate(Session(engine), tokenizer, ids, Sampling(greedy=True), count))


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="small", messages=HELLO, temperature=0, max_tokens=20, **more)  # type: ignore[call-overload]


# --- what is asked for ---


def test_a_chat_whole_and_in_pieces_is_what_the_runtime_says(
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
    assert pieces[-1].usage.prompt_tokens_details.cached_tokens == len(ids) - 1  # the same prompt stands in the cache


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
    asked = {"model": "small", "messages": parts, "temperature": 0, "max_completion_tokens": 20}
    assert client.chat.completions.create(**asked).choices[0].message.content == text
    cut = client.chat.completions.create(**asked, stop=[text[3:5]]).choices[0]
    assert cut.message.content == text[: text.index(text[3:5])] and cut.finish_reason == "stop"
    wanted = tokenizer.encode("x")[0]
    forced = client.chat.completions.create(**{**asked, "max_completion_tokens": 3}, logit_bias={str(wanted): 100})
    assert forced.choices[0].message.content == "xxx"
    hot = {**asked, "temperature": 2, "extra_body": {"top_k": 0}, "top_p": 1}
    said = [client.chat.completions.create(**hot, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_an_answer_has_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
    }
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}}
    asked = {"model": "small", "messages": HELLO, "temperature": 1.5, "max_tokens": 60}
    done = client.chat.completions.create(**asked, response_format=form, seed=3).choices[0]
    assert done.finish_reason == "stop" and set(json.loads(done.message.content)) == {"n"}
    done = client.chat.completions.create(**asked, extra_body={"regex": "(yes|no)"}).choices[0]
    assert done.finish_reason == "stop" and done.message.content in ("yes", "no")


def test_without_a_limit_an_answer_ends_at_the_context(client: openai.OpenAI, gated: Gated) -> None:
    done = client.completions.create(model="small", prompt="fox", temperature=0)
    assert done.choices[0].finish_reason == "length" and done.usage is not None
    assert done.usage.total_tokens == gated.max_positions + 1  # the last token needs no place


def test_models_health_and_metrics(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["small"] == [client.models.retrieve("small").id]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    before, text = sample(url, "merino_edge_generated_tokens_total"), httpx.get(f"{url}/metrics").text
    assert "merino_edge_first_token_seconds_bucket" in text
    ask(client)
    assert sample(url, "merino_edge_generated_tokens_total") == before + 20


def sample(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.split()[0] == name), 0.0)


# --- a queue and those who leave it ---


@pytest.fixture
def held(gated: Gated) -> Iterator[Gated]:
    """Steps wait until the test opens the gate."""
    gated.gate.clear()
    yield gated
    gated.failure, gated.delay_s = None, 0.0
    gated.gate.set()


def test_more_than_may_wait_are_refused_and_the_others_answered(
    client: openai.OpenAI, url: str, held: Gated, engine: Engine, tokenizer: Tokenizer
) -> None:
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(client).choices[0].message.content)) for _ in "12"]
    for thread in threads:
        thread.start()
    wait_until(lambda: sample(url, "merino_edge_pending_answers") == 2)
    with pytest.raises(openai.RateLimitError, match="2 answers are made or wait") as refusal:
        ask(client)
    assert refusal.value.response.headers["retry-after"] == "1"
    held.gate.set()
    for thread in threads:
        thread.join()
    ids = tokenizer.encode_chat([{"role": "user", "content": "The quick brown"}])
    assert answers == 2 * [greedy(engine, tokenizer, ids, 20)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer_and_no_other(
    client: openai.OpenAI, url: str, held: Gated, engine: Engine, tokenizer: Tokenizer, stream: bool
) -> None:
    before, held.delay_s = held.steps, 0.01
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url + CHAT, json={"model": "small", "messages": HELLO, "stream": stream}, timeout=0.3)
    wait_until(lambda: held.steps == before + 1)  # its prefill hangs at the gate
    held.gate.set()
    wait_until(lambda: sample(url, "merino_edge_pending_answers") == 0)
    assert held.steps < before + 50  # of three hundred that the context has room for
    held.delay_s = 0.0
    ids = tokenizer.encode_chat([{"role": "user", "content": "The quick brown"}])
    assert ask(client).choices[0].message.content == greedy(engine, tokenizer, ids, 20)


def test_a_hundred_answers_broken_off_anywhere_leave_no_trace(bundle_path: Path, tokenizer: Tokenizer) -> None:

    def break_off(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0) as mine:
            for _ in range(25):
                prompt = rng.integers(own.vocab_size, size=int(rng.integers(1, 300))).tolist()
                stream = mine.completions.create(model="small", prompt=prompt, stream=True, seed=0)
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


def test_an_engine_that_fails_is_one_answers_error(client: openai.OpenAI, held: Gated) -> None:
    held.gate.set()
    expected = ask(client).choices[0].message.content
    held.failure = MemoryError()
    with pytest.raises(openai.InternalServerError, match="MemoryError"):
        ask(client)
    with pytest.raises(openai.APIError, match="MemoryError"):
        list(ask(client, stream=True))
    held.failure = None
    assert ask(client).choices[0].message.content == expected


# --- what strangers send ---

GOOD = {"model": "small", "messages": HELLO, "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "said"),
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
        ({"n": 2}, "n is not served"),
        ({"tools": [{"type": "function"}]}, "tools is not served"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wings"}}}},
            "this JSON schema cannot be used",
        ),
        ({"regex": "((("}, "this regular expression cannot be used"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "two forms"),
        ({"regex": "a" * (limits.MAX_GRAMMAR_CHARACTERS + 1)}, "characters"),
        ({"wings": True}, "wings"),
        ({"messages": [{"role": "user", "content": ""}], "model": 5}, "model"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(url: str, change: dict[str, Any], said: str) -> None:
    answer = httpx.post(url + CHAT, json=GOOD | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"
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
        (b'{"model": "small", "prompt": ["a", "b"]}', 400),
        (b'{"model": "small", "prompt": [-1]}', 400),
        (b'{"model": "small", "prompt": [1, "b"]}', 400),
        (b'{"model": "other", "prompt": "x"}', 404),
        (b"[" * 100_000, 400),
        (b'{"model": "small", "prompt": "' + b"x" * (limits.MAX_PROMPT_BYTES + 1) + b'"}', 400),
        (b" " * (limits.MAX_REQUEST_BYTES + 1), 413),
    ],
)
def test_a_body_that_cannot_be_is_refused(url: str, body: bytes, status: int) -> None:
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


def test_a_key_is_asked_for_where_one_is_set(bundle_path: Path, tokenizer: Tokenizer) -> None:
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


# --- the verb ---


def test_the_verb_serves_until_it_is_told_to_end(bundle_path: Path) -> None:
    command = [sys.executable, "-m", "merino_edge.cli", "serve", str(bundle_path), "--port", "0", "--name", "small"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        where = program.stderr.readline().split()[2].removesuffix(";")
        with openai.OpenAI(base_url=where, api_key="none", max_retries=0) as client:
            assert ask(client).choices[0].finish_reason == "length"
            endless = client.completions.create(
                model="small", prompt="fox", stream=True, max_tokens=limits.MAX_NEW_TOKENS
            )
            next(iter(endless))
            program.send_signal(signal.SIGINT)
        assert program.wait(PATIENCE_SECONDS) == 130
        assert program.stderr.read().strip() == "merino-edge: interrupted"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0"), "give --api-key TEXT"),
        (("--api-key", ""), "the API key is empty"),
        (("--port", "70000"), "port is 70000"),
        (("--host", "192.0.2.1", "--api-key", "x"), "cannot listen on 192.0.2.1"),
        (("--waiting", "-1"), "waiting is -1"),
    ],
)
def test_the_verb_refuses_what_cannot_be(bundle_path: Path, options: tuple[str, ...], said: str) -> None:
    command = [sys.executable, "-m", "merino_edge.cli", "serve", str(bundle_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named(bundle_path: Path, url: str) -> None:
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "merino_edge.cli", "serve", str(bundle_path), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"port {port}" in done.stderr and done.stderr.count("\n") == 1
