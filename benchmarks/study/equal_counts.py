"""What entropy adds to counting: pairs of models that the control rates alike and the score does not.

    python benchmarks/study/equal_counts.py OUT                 # draws the pairs, and prints the study that trains them
    python benchmarks/study/equal_counts.py OUT --trained       # afterwards: which of each pair has the lower loss

The score and its control rank nearly all models alike, so a random sample says little about their difference. Here the
control's values of a pair are within half a percent, and the pairs are those with the largest difference of the score.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from merino_edge import architecture, artefact
from merino_edge.architecture import Architecture
from merino_edge.search.builtin_spaces import load_space
from merino_edge.search.score import parse_score
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.statistics import percentile_interval, resampled_counts
from merino_edge.training import study_runs

SPACE = """{"kind": "space", "schema_version": 2, "name": "study-open", "base": "study", "shared": [false, true],
 "ffn": ["relu", "swiglu"], "kv_groups": [1, 2]}
"""
SCORE, CONTROL = "calibrated", "counting"
DRAWN, ALIKE = 4000, 1.005
FEWEST, MOST = 4e4, 1.6e5  # decoder parameters


def pairs(space_path: Path, count: int, seed: int) -> list[tuple[Architecture, Architecture]]:
    """`count` pairs of different architectures; the score prefers the second of each."""
    space, rng = load_space(str(space_path)), random.Random(seed)
    score, control = parse_score(SCORE), parse_score(CONTROL)
    drawn: dict[str, Architecture] = {}
    while len(drawn) < DRAWN:
        a = space.architecture(space.sample(rng))
        if FEWEST <= decoder_parameters(a) <= MOST:
            drawn[a.id] = a
    rated = sorted(((control.total(a), score.total(a), a) for a in drawn.values()), key=lambda row: row[0])
    candidates = []
    for i, (counted, value, a) in enumerate(rated):
        for other_counted, other_value, other in rated[i + 1 :]:
            if other_counted > counted * ALIKE:
                break
            low, high = (a, other) if value < other_value else (other, a)
            candidates.append((max(value, other_value) / min(value, other_value), low, high))
    chosen: list[tuple[Architecture, Architecture]] = []
    used: set[str] = set()
    for _, low, high in sorted(candidates, key=lambda row: (-row[0], row[1].id)):
        if len(chosen) < count and not {low.id, high.id} & used:
            used |= {low.id, high.id}
            chosen.append((low, high))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=27)
    parser.add_argument("--trained", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    space, study = options.out / "space.json", options.out / "study"
    space.write_text(SPACE)
    chosen = pairs(space, options.pairs, options.seed)
    if not options.trained:
        words = []
        for i, pair in enumerate(chosen):
            for name, a in zip("ab", pair, strict=True):
                path = options.out / f"pair{i}{name}.json"
                architecture.save(path, a)
                words.append(f"--model {path}")
        print(f"merino-edge study {study} --corpus TEXT --seeds 2 --steps 500 {' '.join(words)}")
        return
    losses_of: dict[str, dict[int, float]] = {}  # by architecture and seed
    for run in study_runs.runs(study, study_runs.load(study)):
        if run.finished:
            training = artefact.read_json(run.folder / "training.json", "checkpoint")
            losses_of.setdefault(run.architecture.id, {})[run.seed] = training["validation_loss"]
    differences = []
    print("pair  score ratio  control ratio  sizes            loss of both         difference")
    for i, (low, high) in enumerate(chosen):
        seeds = sorted(losses_of.get(low.id, {}).keys() & losses_of.get(high.id, {}).keys())
        if not seeds:
            continue
        ratios = [parse_score(spec).total(high) / parse_score(spec).total(low) for spec in (SCORE, CONTROL)]
        losses = [[losses_of[a.id][seed] for seed in seeds] for a in (low, high)]
        difference = np.mean(losses[1]) - np.mean(losses[0])
        differences.append(difference)
        said = [" ".join(f"{loss:.3f}" for loss in each) for each in losses]
        sizes = f"{decoder_parameters(low):,} {decoder_parameters(high):,}"
        print(f"{i:>4}  {ratios[0]:>11.3f}  {ratios[1]:>13.4f}  {sizes:<16} {said[0]} | {said[1]}  {difference:+.3f}")
    values = np.array(differences)
    draws = resampled_counts(len(values), 2000, 0) @ values / len(values)
    low_end, high_end = percentile_interval(draws[:, None])
    spread = [max(each.values()) - min(each.values()) for each in losses_of.values() if len(each) > 1]
    print(
        f"{(values < 0).sum()} of {len(values)} pairs as {SCORE} says; mean difference {values.mean():+.4f} nats "
        f"({float(low_end[0]):+.4f} to {float(high_end[0]):+.4f}); seeds of one model differ by {np.median(spread):.4f}"
    )


if __name__ == "__main__":
    main()
