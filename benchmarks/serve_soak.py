"""A server under pressure: clients that ask, leave, read slowly and send nonsense, for half an hour.

    python benchmarks/serve_soak.py BUNDLE [--minutes 30] [--clients 8] [--threads 2]

It starts `merino-edge serve`. Each client does one thing after the other at random: chats, streams, tools, forms,
several answers, log-probabilities, a stream that it leaves, one that it reads slowly, a bad request, a prompt of a
megabyte. /health is asked once a second, from its own process. In the end 32 prompts of a megabyte come at once. It
prints the answers by status, the slowest /health, and the server's memory in the first minute and at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
THINGS = ("a river", "the moon", "bread", "winter", "a clock", "paper")
NONSENSE = ("", "{", "[]", "null", '{"messages": 3}', '{"messages": [], "top_p": 7}', '{"messages": [{"role": "x"}]}')
MEGABYTE = "word " * 200_000
SLOW_S, LEAVES_AFTER_BYTES = 3.0, 800


class Client(threading.Thread):
    """One client, which does things at random until `until`."""

    def __init__(self, port: int, seed: int, until: float) -> None:
        super().__init__(daemon=True)
        self._port, self._rng, self._until = port, random.Random(seed), until
        self.statuses = Counter[str]()

    def run(self) -> None:
        ways: list[Callable[[], None]] = [self.chat, self.chat, self.leave, self.slow, self.nonsense, self.megabyte]
        while time.monotonic() < self._until:
            way = self._rng.choice(ways)
            try:
                way()
            except (OSError, http.client.HTTPException) as error:
                self.statuses[f"{way.__name__}: {type(error).__name__}"] += 1

    def _post(self, body: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        connection.request("POST", "/v1/chat/completions", body.encode(), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def _asked(self, *, stream: bool, tokens: int) -> str:
        question = f"Tell me about {self._rng.choice(THINGS)}."
        more: dict[str, Any] = self._rng.choice(
            ({}, {}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}, {"response_format": FORM}, {"tools": [TOOL]})
        )
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": stream, **more}
        return json.dumps({**body, "temperature": 0.7, "seed": self._rng.randrange(1000)})

    def chat(self) -> None:
        """Ask and read the whole answer. A stream must end as streams do."""
        stream = self._rng.random() < 0.5
        connection, response = self._post(self._asked(stream=stream, tokens=self._rng.randrange(1, 40)))
        data = response.read()
        cut = stream and response.status == 200 and b"data: [DONE]" not in data
        self.statuses["a stream without its end" if cut else f"chat: {response.status}"] += 1
        connection.close()

    def leave(self) -> None:
        """Leave in the midst of an answer."""
        connection, response = self._post(self._asked(stream=True, tokens=500))
        response.read(self._rng.randrange(LEAVES_AFTER_BYTES))
        connection.close()
        self.statuses[f"left: {response.status}"] += 1

    def slow(self) -> None:
        """Read a few bytes at a time, and leave."""
        connection, response = self._post(self._asked(stream=True, tokens=200))
        until = time.monotonic() + SLOW_S
        while time.monotonic() < until and response.read(3):
            time.sleep(0.1)
        connection.close()
        self.statuses[f"slow: {response.status}"] += 1

    def nonsense(self) -> None:
        """Send what is no request."""
        connection, response = self._post(self._rng.choice(NONSENSE))
        response.read()
        connection.close()
        self.statuses[f"nonsense: {response.status}"] += 1

    def megabyte(self) -> None:
        """Send a prompt that no context holds."""
        connection, response = self._post(json.dumps({"messages": [{"role": "user", "content": MEGABYTE}]}))
        response.read()
        connection.close()
        self.statuses[f"megabyte: {response.status}"] += 1


def watch(port: int, found: Any) -> None:
    """Ask /health once a second, and put the seconds that it takes into `found`."""
    while True:
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        ok = connection.getresponse().status == 200
        connection.close()
        found.put(time.perf_counter() - began if ok else 1e9)
        time.sleep(1)


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    command = [sys.executable, "-m", "merino_edge", "serve", str(given.bundle), "--port", "0"]
    server = subprocess.Popen([*command, "--threads", str(given.threads)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = next(line for line in server.stderr if "http://" in line)
    port = int(re.search(r":(\d+)/v1", line)[1])  # type: ignore[index]
    threading.Thread(target=lambda: [print("server:", x, end="") for x in server.stderr or ()], daemon=True).start()
    healths: Any = multiprocessing.Queue()
    watcher = multiprocessing.Process(target=watch, args=(port, healths), daemon=True)
    watcher.start()
    began = time.monotonic()
    until = began + 60 * given.minutes
    clients = [Client(port, seed, until) for seed in range(given.clients)]
    for client in clients:
        client.start()
    memory: list[tuple[float, float]] = []  # minutes, MB
    while any(client.is_alive() for client in clients):
        time.sleep(1)
        memory.append(((time.monotonic() - began) / 60, resident_mb(server.pid)))
    last = [Client(port, seed, 0) for seed in range(32)]
    senders = [threading.Thread(target=client.megabyte) for client in last]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    time.sleep(1)
    watcher.terminate()
    seconds = [healths.get() for _ in range(healths.qsize())]
    for what, count in sorted(sum((client.statuses for client in [*clients, *last]), Counter[str]()).items()):
        print(f"{count:7d}  {what}")
    first = max((mb for minute, mb in memory if minute <= 1), default=memory[0][1])
    newest = statistics.median(mb for minute, mb in memory if minute >= 0.9 * memory[-1][0])
    most = max(mb for _, mb in memory)
    print(f"/health: at most {max(seconds):.2f} s of {len(seconds)}, median {1e3 * statistics.median(seconds):.0f} ms")
    print(f"memory: {first:.0f} MB in the first minute, {newest:.0f} at the end ({newest / first - 1:+.1%})")
    print(f"most memory: {most:.0f} MB")
    server.terminate()
    print(f"exit {server.wait(60)} after SIGTERM")


if __name__ == "__main__":
    main()
