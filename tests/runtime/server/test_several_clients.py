"""Several clients at once: each gets the answer that it gets alone; and who leaves gives its place up at once."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import httpx2 as httpx
import pytest

from helpers.served import CHAT, HELLO, TEXT, Gated, sample, serving, wait_until
from merino_edge.runtime.open_bundle import open_engine, open_sequences
from merino_edge.runtime.server.app import Service
from merino_edge.runtime.server.pace import MAX_SECONDS, Pace
from merino_edge.tokenizer import Tokenizer

CLIENTS, REQUESTS = 6, 36


def request(number: int) -> tuple[str, dict[str, object]]:
    """A path and a body: chats and texts that share beginnings, of all lengths, some with a form."""
    rng = random.Random(number)
    sampling = {"temperature": rng.choice([0, 1]), "seed": rng.randrange(3), "max_tokens": rng.randrange(1, 20)}
    text = ("The quick brown fox jumps over the lazy dog. " * 3)[: rng.randrange(1, 130)]
    if rng.random() < 0.2:
        sampling["regex"] = "(yes|no)+"
    if rng.random() < 0.5:
        return CHAT, {"model": "small", "messages": [{"role": "user", "content": text}], **sampling}
    return TEXT, {"model": "small", "prompt": text, **sampling}


def said(client: httpx.Client, path: str, body: dict[str, object]) -> tuple[str, str, int]:
    reply = client.post(path, json=body, timeout=30).json()
    choice = reply["choices"][0]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    return text, choice["finish_reason"], reply["usage"]["completion_tokens"]


def test_clients_at_once_get_the_answers_that_one_gets(
    bundle_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, _ = open_engine(bundle_path, threads=1)
    alone = Service(engine, tokenizer, "small", waiting=1, key=None)
    with closing(engine), serving(alone) as url, httpx.Client(base_url=url) as own:
        golden = [said(own, *request(number)) for number in range(REQUESTS)]
    group, _, _ = open_sequences(bundle_path, 3, threads=1)
    rows, step = list[int](), group.step
    monkeypatch.setattr(group, "step", lambda asked: rows.append(len(asked)) or step(asked))
    answers: dict[int, tuple[str, str, int]] = {}
    numbers = iter(random.Random(0).sample(range(REQUESTS), REQUESTS))
    lock = threading.Lock()

    def client(own: httpx.Client) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            path, body = request(number)
            if number % 7 == 0:  # this one leaves, and asks again
                with pytest.raises(httpx.TimeoutException):
                    own.post(path, json={**body, "max_tokens": 100}, timeout=0.002)
            answers[number] = said(own, path, body)

    service = Service(group.members[0], tokenizer, "small", waiting=CLIENTS, key=None, group=group)
    with closing(group), serving(service) as url, ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=url)) for _ in range(CLIENTS)]
        threads = [threading.Thread(target=client, args=(own,)) for own in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answers[number] for number in range(REQUESTS)] == golden
    assert not group.joins_steps or max(rows) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_the_queue_gives_its_place_up(bundle_path: Path, tokenizer: Tokenizer, stream: bool) -> None:
    engine, _, _ = open_engine(bundle_path, threads=1)
    gated = Gated(engine)
    gated.gate.clear()
    body, answers = {"model": "small", "messages": HELLO, "max_tokens": 3, "stream": stream}, list[httpx.Response]()

    def ask() -> None:
        answers.append(own.post(CHAT, json=body, timeout=30))

    with (
        closing(engine),
        serving(Service(gated, tokenizer, "small", waiting=2, key=None)) as where,
        httpx.Client(base_url=where) as own,
    ):
        asking = [threading.Thread(target=ask) for _ in range(2)]
        asking[0].start()
        wait_until(lambda: sample(where, "merino_edge_pending_answers") == 1 and gated.steps == 1)
        for _ in range(4):  # more than may wait
            with pytest.raises(httpx.TimeoutException):
                own.post(CHAT, json=body, timeout=0.1)
            wait_until(lambda: sample(where, "merino_edge_pending_answers") == 1)
        asking[1].start()
        wait_until(lambda: sample(where, "merino_edge_pending_answers") == 2)
        gated.gate.set()
        for thread in asking:
            thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]


def test_the_pace_says_when_the_next_answer_ends() -> None:
    pace = Pace(at_once=4)
    assert pace.seconds_to_next_end == 1
    for _ in range(50):
        pace.ended(40.0)
    assert pace.seconds_to_next_end == 10
    for _ in range(50):
        pace.ended(0.2)
    assert pace.seconds_to_next_end == 1
    pace.ended(1e6)
    assert pace.seconds_to_next_end == MAX_SECONDS
