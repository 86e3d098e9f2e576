"""Any scores against decoder parameters, over the models of one or several studies of the same trainings.

    merino-edge study STUDY --space SPACE --seed 1 --from 1e4 --to 1e5 --models 28 --steps 1000 --corpus T
    python benchmarks/study/study_scores.py STUDY [STUDY ...] --score exit exit:shared_layer=0.1 --without EARLIER

`--without` leaves out the architectures of other studies: those that a score's constants were fitted to. What is
printed is of docs/study.md: Spearman, Kendall, Kendall over models of like size, and each less that of decoder
parameters, with 95 % intervals. A model stands once; trainings that are not finished are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from merino_edge.cli.study import trained
from merino_edge.search.score import parse_score
from merino_edge.search.study.rank_correlation import agreement, difference
from merino_edge.search.study.report import agreement_cells
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.search.study.scores import Trained, like_size
from merino_edge.training import study_runs

SCORES = ("effective", "exit", "effective:shared_layer=0.1", "exit:shared_layer=0.1", "flops")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--score", nargs="+", default=SCORES)
    parser.add_argument("--without", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    seen = {a.id for folder in options.without for a in study_runs.load(folder).architectures}
    models: dict[str, Trained] = {}
    for folder in options.studies:
        found = trained(folder, study_runs.load(folder))
        models |= {model.architecture.id: model for model in found if model.architecture.id not in seen}
    architectures = [model.architecture for model in models.values()]
    loss, alike = np.array([model.loss for model in models.values()]), like_size(architectures)
    parameters = np.array([decoder_parameters(a) for a in architectures], np.float64)
    print(f"{len(loss)} models, losses {loss.min():.3f} to {loss.max():.3f}, {alike.sum() // 2} pairs of like size")
    print(f"{'decoder parameters':<30} {'  '.join(agreement_cells(agreement(parameters, loss, alike)))}")
    for spec in options.score:
        values = np.array([parse_score(spec).total(a) for a in architectures])
        print(f"{spec:<30} {'  '.join(agreement_cells(agreement(values, loss, alike)))}")
        over = difference(values, parameters, loss, alike)
        print(f"{'  over decoder parameters':<30} {'  '.join(agreement_cells(over))}")


if __name__ == "__main__":
    main()
