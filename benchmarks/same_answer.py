"""Whether the same request gets the same answer, whatever ran before.

    python benchmarks/same_answer.py BUNDLE [BUNDLE ...] [--requests 100] [--control]

Each request is answered once by a new session, then three times in random order among the others in one session.
Requests are beginnings of a text, chats that grow turn by turn, and seeds and temperatures. A row counts the answers
that differ, and those whose first token does. `--control` reuses all that is in the cache, however it came there.
"""

from __future__ import annotations

import argparse
import random
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from merino_edge.export.parity import TEXT
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how it is answered."""

    ids: tuple[int, ...]
    sampling: Sampling


def requests(tokenizer: Tokenizer, engine: Engine, count: int, tokens: int, rng: random.Random) -> list[Request]:
    """`count` requests, many of which share a beginning. An answer of one is part of the next one's prompt."""
    text, made = tokenizer.encode(TEXT * 3), list[Request]()
    room = engine.max_positions - tokens
    while len(made) < count:
        ids = text[(first := rng.randrange(3) * 7) : first + rng.randrange(1, min(len(text), room) - 21)]
        for _ in range(rng.randrange(1, 4)):
            sampling = Sampling(temperature=rng.choice((0.0, 0.5, 1.0)), seed=rng.randrange(9))
            made.append(Request(tuple(ids), sampling))
            ids = [*ids, *answer(Session(engine), tokenizer, made[-1], tokens), *rng.sample(text, 5)]
            if len(ids) > room:
                break
    return made[:count]


def answer(session: Session, tokenizer: Tokenizer, request: Request, tokens: int) -> list[int]:
    generation = generate(session, tokenizer, request.ids, request.sampling, tokens)
    for _ in generation:
        pass
    return generation.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print("| bundle | requests | answers | differ | in the first token |")
    print("|---|---|---|---|---|")
    for path in options.bundles:
        rng = random.Random(0)
        engine, tokenizer, _ = open_engine(path, threads=options.threads)
        with closing(engine):
            asked = requests(tokenizer, engine, options.requests, options.tokens, rng)
            golden = {request: answer(Session(engine), tokenizer, request, options.tokens) for request in asked}
            order, session = asked * 3, Session(engine, exact=not options.control)
            rng.shuffle(order)
            pairs = [(golden[request], answer(session, tokenizer, request, options.tokens)) for request in order]
        differ = [(old, new) for old, new in pairs if old != new]
        early = sum(old[:1] != new[:1] for old, new in differ)
        print(f"| {path.name} | {len(asked)} | {len(pairs)} | {len(differ)} | {early} |", flush=True)


if __name__ == "__main__":
    main()
