"""Several answers at once: tokens a second of 1, 2 and 4 sequences, and whether they stay what they are alone.

    python benchmarks/several_at_once.py BUNDLE [--sequences 1 2 4] [--rounds 9] [--tokens 64] [--threads 2]
    python benchmarks/several_at_once.py BUNDLE --golden 4000 [--clients 8]

The first form prints the median over rounds of all tokens a second, with its spread (1.4826 MAD). The ratio, round by
round, is to the engine that `generate` opens. Every answer is compared with the answer alone. At the end a newcomer's
prompt comes while the others run: how many steps of theirs pass before its first token. The second form serves the
bundle over HTTP: clients ask at random, one of ten leaves early, and answers are compared with those alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from merino_edge.export.parity import TEXT
from merino_edge.latency.measurement import spread_percent
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.open_bundle import open_engine, open_sequences
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.sequence_memory import sequence_bytes
from merino_edge.runtime.server.rounds import Rounds
from merino_edge.runtime.session import Session
from merino_edge.runtime.shared_sessions import SharedSessions
from merino_edge.tokenizer import Tokenizer


class Speeds:
    """Runs as many answers at once as asked for, and times their tokens after the first."""

    def __init__(self, bundle: Path, most: int, tokens: int, threads: int) -> None:
        self.alone, tokenizer, opened = open_engine(bundle, threads=threads)
        self.by_itself = Session(self.alone)
        self.group, _, _ = open_sequences(bundle, most, threads)
        self.sequence_mb = sequence_bytes(opened) / 1e6
        self.tokenizer = tokenizer.with_chat(replace(tokenizer.chat, eos_token_ids=()))  # answers of one length
        self.sessions, self.tokens = SharedSessions(self.group), tokens
        text = tokenizer.encode(TEXT * 3)
        self.prompts = [text[7 * i : 7 * i + 40 + 10 * i] for i in range(most + 1)]
        self.golden = [self.timed(i)[1] for i in range(most)]

    def answer(self, number: int, session: Session) -> Generation:
        return generate(session, self.tokenizer, self.prompts[number], Sampling(seed=number), self.tokens)

    def timed(self, number: int) -> tuple[float, list[int]]:
        """Tokens a second of one answer on the engine by itself, and its tokens."""
        generation = self.answer(number, self.by_itself)
        while not generation.tokens:
            next(generation)
        before, began = len(generation.tokens), time.perf_counter()
        for _ in generation:
            pass
        return (len(generation.tokens) - before) / (time.perf_counter() - began), generation.tokens

    def at_once(self, count: int) -> float:
        """All tokens a second of `count` answers, once all prompts have run."""
        rounds, answers = Rounds(self.sessions), [self.answer(i, self.sessions.every[0]) for i in range(count)]
        for generation in answers:
            rounds.begin(generation, lambda piece: None, lambda failure: None)
        while not all(generation.tokens for generation in answers):
            rounds.run()
        before, began = sum(len(generation.tokens) for generation in answers), time.perf_counter()
        while len(rounds):
            rounds.run()
        after = sum(len(generation.tokens) for generation in answers)
        assert [generation.tokens for generation in answers] == self.golden[:count], "an answer depends on the others"
        return (after - before) / (time.perf_counter() - began)

    def steps_before_first_token(self, others: int) -> int:
        """How many tokens another answer gets between a newcomer's arrival and its first token."""
        rounds, answers = Rounds(self.sessions), [self.answer(i, self.sessions.every[0]) for i in range(others + 1)]
        for generation in answers[:-1]:
            rounds.begin(generation, lambda piece: None, lambda failure: None)
        while not all(generation.tokens for generation in answers[:-1]):
            rounds.run()
        first: list[int] = []
        rounds.begin(answers[-1], lambda piece: first.append(len(answers[0].tokens)), lambda failure: None)
        before = len(answers[0].tokens)
        while len(rounds):
            rounds.run()
        return first[0] - before


def measure(options: argparse.Namespace) -> None:
    speeds = Speeds(options.bundle, max(options.sequences), options.tokens, options.threads)
    how = "joint steps" if speeds.group.joins_steps else "in turns"
    print(
        f"{options.bundle.name}: {how}, {speeds.sequence_mb:,.0f} MB for a further sequence, {options.threads} threads"
    )
    found: dict[str, list[float]] = {"generate": [], **{str(count): [] for count in options.sequences}}
    for number in range(options.rounds):
        for name in list(found) if number % 2 else list(found)[::-1]:
            found[name].append(speeds.timed(0)[0] if name == "generate" else speeds.at_once(int(name)))
    print("| answers at once | tokens/s | spread | times `generate` | middle half of rounds |")
    print("|---|---|---|---|---|")
    for name, mine in found.items():
        ratios = [a / b for a, b in zip(mine, found["generate"], strict=True)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(
            f"| {name} | {statistics.median(mine):.1f} | {spread_percent(mine):.1f} % |"
            f" {middle:.3f} | {low:.3f} to {high:.3f} |"
        )
    if (others := max(options.sequences) - 1) > 0:
        print(f"steps before a newcomer's first token, {others} running: {speeds.steps_before_first_token(others)}")
    speeds.group.close()
    speeds.alone.close()


def compare(options: argparse.Namespace) -> None:
    """Answers over HTTP against golden ones."""
    import httpx2 as httpx
    import uvicorn

    from merino_edge.runtime.server import connections
    from merino_edge.runtime.server.app import Service

    rng = random.Random(options.seed)
    engine, tokenizer, _ = open_engine(options.bundle, threads=options.threads)
    text = tokenizer.encode(TEXT * 3)
    asked = [
        {
            "prompt": text[(first := rng.randrange(3) * 7) : first + rng.randrange(1, 150)],
            "temperature": rng.choice([0, 0.5, 1]),
            "seed": rng.randrange(9),
            "max_tokens": rng.randrange(1, options.tokens),
        }
        for _ in range(options.requests)
    ]
    with closing(engine):
        golden = [_golden(engine, tokenizer, body) for body in asked]
    group, _, _ = open_sequences(options.bundle, max(options.sequences), options.threads)
    service = Service(group.members[0], tokenizer, "model", waiting=options.clients, key=None, group=group)
    server = uvicorn.Server(connections.config(service.application(), port=0))
    serving = threading.Thread(target=server.run)
    serving.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    order = [i % len(asked) for i in range(options.golden)]
    rng.shuffle(order)
    left, lock, differ, broken_off = iter(order), threading.Lock(), list[int](), list[int]()

    def client(seed: int) -> None:
        own = random.Random(seed)
        with httpx.Client(base_url=url, timeout=600) as http:
            while (number := _next(left, lock)) is not None:
                if own.random() < 0.1:
                    try:
                        http.post("/v1/completions", json={**asked[number], "max_tokens": 200}, timeout=own.random())
                    except httpx.TimeoutException:
                        broken_off.append(number)
                reply = http.post("/v1/completions", json=asked[number]).json()
                if reply["choices"][0]["text"] != golden[number]:
                    differ.append(number)

    began = time.perf_counter()
    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(options.clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    print(
        f"{options.bundle.name}: {len(order)} answers to {len(asked)} requests by {options.clients} clients,"
        f" {len(broken_off)} more broken off, in {time.perf_counter() - began:.0f} s: {len(differ)} differ"
    )
    service.cancel_all()
    server.should_exit = True
    serving.join()
    service.close()
    group.close()


def _next(left: object, lock: threading.Lock) -> int | None:
    with lock:
        return next(left, None)  # type: ignore[call-overload, no-any-return]


def _golden(engine: Engine, tokenizer: Tokenizer, body: dict[str, object]) -> str:
    sampling = Sampling(temperature=body["temperature"], seed=body["seed"])  # type: ignore[arg-type]
    with closing(Session(engine)) as session:
        return "".join(generate(session, tokenizer, body["prompt"], sampling, body["max_tokens"]))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--golden", type=int, default=0, help="answers to compare over HTTP")
    parser.add_argument("--requests", type=int, default=200, help="different ones among them")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (compare if options.golden else measure)(options)


if __name__ == "__main__":
    main()
