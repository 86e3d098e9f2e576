"""A server in this process, with a real engine whose steps a test can stop, and requests to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import uvicorn

from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.server import connections
from merino_edge.runtime.server.app import Service
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "The quick brown"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE_SECONDS = 20


class Gated:
    """A real engine whose steps wait for a gate, so that a test can look at an unfinished answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.vocab_size = engine, engine.vocab_size
        self.max_positions, self.max_rows = engine.max_positions, engine.max_rows
        self.prompt_grid = engine.prompt_grid
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

    def mark_filled(self, positions: int) -> None:
        self._engine.mark_filled(positions)

    def close(self) -> None:
        self._engine.close()


@contextmanager
def serving(service: Service) -> Iterator[str]:
    server = uvicorn.Server(connections.config(service.application(), port=0))
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


def wait_until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.005)


def greedy(engine: Engine, tokenizer: Tokenizer, ids: list[int], count: int) -> str:
    return "".join(generate(Session(engine), tokenizer, ids, Sampling(greedy=True), count))


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="small", messages=HELLO, temperature=0, max_tokens=20, **more)  # type: ignore[call-overload]


def sample(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.split()[0] == name), 0.0)
