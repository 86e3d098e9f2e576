"""The loop of a peer's process: one JSON request a line on stdin, one JSON answer a line on stdout.

A peer is an object with `run(tokens, start) -> greedy next id`, `logits(tokens, start) -> [V]` and `version`; `start` 0
begins a new sequence. Only the standard library and numpy, since every peer has an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Peer(Protocol):
    version: str

    def run(self, tokens: list[int], start: int) -> int:
        """The likeliest token after `tokens` at positions start.. ."""
        ...

    def logits(self, tokens: list[int], start: int) -> Any:
        """Those [V] after `tokens` at positions start.. ."""
        ...


def serve(open_peer: Any) -> None:
    """Open the model that argv names with argv's threads, then answer until stdin ends."""
    # What a library prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    path, threads = Path(sys.argv[1]), int(sys.argv[2])
    peer: Peer = open_peer(path, threads)
    print(json.dumps({"version": peer.version}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(peer, json.loads(line))), file=answers, flush=True)


def _answer(peer: Peer, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["do"] == "run":
        return _run(peer, asked["prompt"], asked["new"])
    if asked["do"] == "logits":
        tokens = asked["tokens"]
        rows = [np.array(peer.logits([token], at), np.float32) for at, token in enumerate(tokens)]
        np.save(asked["to"], np.stack(rows))
        return {}
    status = Path("/proc/self/status").read_text().splitlines()
    return {"peak_mb": next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024 / 1e6}


def _run(peer: Peer, prompt: list[int], new: int) -> dict[str, Any]:
    """Times of one prompt and of a greedy continuation that nothing ends early."""
    began = time.perf_counter()
    token = peer.run(prompt, 0)
    prefilled = time.perf_counter()
    for position in range(len(prompt), len(prompt) + new):
        token = peer.run([token], position)
    ended = time.perf_counter()
    return {"prompt_ms": 1e3 * (prefilled - began), "decode_ms": 1e3 * (ended - prefilled)}
