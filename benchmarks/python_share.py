"""What part of a decode step is not ONNX Runtime's: sampling, detokenising, binding, the loop.

    python benchmarks/python_share.py smollm2-int4 --threads 2

Answers of one bundle, greedy and with the sampling that `generate` has by default, in turn. Of every step the engine's
call is timed, and what lies between two calls. Of a round's steps the lower quartile of each counts: what disturbs a
step only makes it slower, and on a busy machine it would make the share small by making the call slow. Medians over
rounds and their range; the load average is the machine's, before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session

SAMPLINGS = {"greedy": Sampling(greedy=True), "default": Sampling(0.5, 40, 0.95, seed=0)}
PROMPT = "The quick brown fox jumps over the lazy dog and then"


class Timed:
    """In place of ONNX Runtime's session: when each of its calls began and ended."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.calls: list[tuple[float, float]] = []

    def run_with_iobinding(self, binding: Any) -> None:
        began = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.calls.append((began, time.perf_counter()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    options = parser.parse_args()
    engine, tokenizer, _ = open_engine(options.bundle, options.threads, cpu=True)
    assert isinstance(engine, OnnxEngine)
    timed = engine._session = Timed(engine._session)
    # Microseconds (outside, inside) of a step, by round.
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SAMPLINGS}
    before = os.getloadavg()[0]
    with contextlib.closing(engine):
        for number in range(-1, options.rounds):  # the first warms up
            for name, sampling in SAMPLINGS.items():
                # Generation by generation: an end token would cut an answer short.
                outside, inside = list[float](), list[float]()
                while len(outside) < options.new_tokens:
                    answer = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), sampling, 64)
                    next(answer)
                    timed.calls = []
                    for _ in answer:
                        pass
                    outside += [1e6 * (begin - end) for (_, end), (begin, _) in itertools.pairwise(timed.calls)]
                    inside += [1e6 * (end - begin) for begin, end in timed.calls[1:]]
                if number >= 0:
                    found[name].append((lower_quartile(outside), lower_quartile(inside)))
    for name, rounds in found.items():
        shares = [100 * outside / (outside + inside) for outside, inside in rounds]
        outside_us, inside_us = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"{name:<8} {inside_us / 1e3:.3f} ms in the engine's call, {outside_us:.0f} us outside: "
            f"{statistics.median(shares):.1f} % ({min(shares):.1f} - {max(shares):.1f})"
        )
    print(f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after")


def lower_quartile(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=4)[0]


if __name__ == "__main__":
    main()
