"""A thousand answers in a row: does memory stay flat?

    python benchmarks/soak.py BUNDLE --answers 1000 --threads 2

One session answers prompts of 1 to 200 random tokens with 1 to 50 tokens, and half of the answers are broken off. One
answer before them uses every buffer. It prints the resident memory after each tenth, and by how much it grew.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np

from merino_edge.runtime.generation import generate
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    engine, tokenizer, _ = open_engine(options.bundle, options.threads)
    with contextlib.closing(engine):
        session, seen = Session(engine), list[float]()
        list(generate(session, tokenizer, [0] * 200, Sampling(seed=0), 50))
        for number in range(options.answers):
            prompt = rng.integers(engine.vocab_size, size=int(rng.integers(1, 200))).tolist()
            answer = generate(session, tokenizer, prompt, Sampling(seed=number), int(rng.integers(1, 50)))
            least = int(rng.integers(0, 30)) if number % 2 else options.answers
            for pieces, _ in enumerate(answer):
                if pieces == least:
                    break
            answer.close()
            seen.append(resident_mb())
    tenths = [seen[len(seen) * part // 10 - 1] for part in range(1, 11)]
    print(f"{len(seen)} answers, MB after each tenth: {', '.join(f'{mb:.1f}' for mb in tenths)}", end="; ")
    print(f"{100 * (tenths[-1] / tenths[0] - 1):+.2f} %")


if __name__ == "__main__":
    main()
