"""What part of a decode step is not ONNX Runtime's: sampling, detokenising, binding, the loop.

    python benchmarks/python_share.py smollm2-int4 --threads 2

Answers of one bundle, greedy and with the sampling that `generate` has by default, in turn. The engine's call is timed
inside, everything outside; the share is what is left. Medians over rounds with their spread (1.4826 MAD).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

from merino_edge.measurement import spread_percent
from merino_edge.runtime.engine import open_engine
from merino_edge.runtime.generation import Session, generate
from merino_edge.runtime.onnx_engine import OnnxEngine
from merino_edge.runtime.sampling import Sampling

SAMPLINGS = {"greedy": Sampling(greedy=True), "default": Sampling(0.5, 40, 0.95, seed=0)}
PROMPT = "The quick brown fox jumps over the lazy dog and then"


class Timed:
    """In place of ONNX Runtime's session: adds up the time of its calls."""

    def __init__(self, session: Any) -> None:
        self.session, self.seconds = session, 0.0

    def run_with_iobinding(self, binding: Any) -> None:
        began = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - began


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
    shares: dict[str, list[float]] = {name: [] for name in SAMPLINGS}
    steps: dict[str, list[float]] = {name: [] for name in SAMPLINGS}
    with contextlib.closing(engine):
        for number in range(-1, options.rounds):  # the first warms up
            for name, sampling in SAMPLINGS.items():
                # Generation by generation: an end token would cut an answer short.
                done, inside, outside = 0, 0.0, 0.0
                while done < options.new_tokens:
                    answer = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), sampling, 64)
                    next(answer)
                    before, began = timed.seconds, time.perf_counter()
                    for _ in answer:
                        pass
                    outside += time.perf_counter() - began
                    inside += timed.seconds - before
                    done += max(1, answer.statistics.generated_tokens - 1)
                if number >= 0:
                    shares[name].append(100 * (1 - inside / outside))
                    steps[name].append(1e3 * outside / done)
    for name, share in shares.items():
        print(
            f"{name:<8} {statistics.median(steps[name]):.3f} ms a step, spread {spread_percent(steps[name]):.1f} %, "
            f"outside the engine's call {statistics.median(share):.1f} % ({min(share):.1f} - {max(share):.1f})"
        )


if __name__ == "__main__":
    main()
