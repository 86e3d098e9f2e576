"""The paper's search, solved exactly: what docs/reproduction.md reports.

    python benchmarks/paper/reproduce_paper.py optima                      # the optima at the default constants
    python benchmarks/paper/reproduce_paper.py calibrate                   # which constants come closest (8 minutes)
    python benchmarks/paper/reproduce_paper.py sensitivity docs/figures/sensitivity.png     # 1 minute
    python benchmarks/paper/reproduce_paper.py landscape docs/figures/landscape.png         # 4 minutes

The paper prints, for three FLOP budgets, the parameters of its models with shared layers and without (sections 6 and
8). It leaves open alpha, epsilon and how the depth penalty enters (sections 3 and 4). For any choice of them the
exact solver finds the optimum of the paper's space. Its six parameter counts are compared with the printed ones. Only
the ratio of the alphas matters to an optimum, so alpha_ffn is 1 - alpha_mha here.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.search import report
from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import PAPER
from merino_edge.search.costs import CostModel
from merino_edge.search.entropy import Hyperparameters
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import effective

# FLOPs budget, parameters in M with shared layers, and without
TARGETS = ((60e9, 52, 59), (110e9, 61, 79), (160e9, 64, 100))
SHARES = tuple(np.round(np.arange(0.1, 0.95, 0.1), 2))  # alpha_mha
EPSILONS = tuple(float(f"{x:.3g}") for x in np.geomspace(3, 30_000, 13))  # epsilon squared
POWERS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # of the depth penalty
Constants = tuple[float, float, float]  # alpha_mha, epsilon_squared, effectiveness_power
_USUAL = Hyperparameters()
DEFAULT: Constants = (_USUAL.alpha_mha, _USUAL.epsilon_squared, _USUAL.effectiveness_power)


def optima(constants: Constants) -> list[Architecture]:
    """The optimum of the paper's space under each budget, layers shared."""
    share, epsilon_squared, power = constants
    hyperparameters = Hyperparameters(share, 1 - share, epsilon_squared, effectiveness_power=power)
    found = []
    for flops, *_ in TARGETS:
        problem = Problem(PAPER, Budget.of({"flops": flops}), effective(hyperparameters), CostModel("fp16"))
        certificate = ExactSolver(problem).solve()
        assert certificate.candidate is not None and certificate.gap_percent == 0
        found.append(PAPER.architecture(certificate.candidate))
    return found


def unshared(a: Architecture) -> Architecture:
    return dataclasses.replace(a, blocks=tuple(dataclasses.replace(block, shared=False) for block in a.blocks))


def counts(constants: Constants) -> list[float]:
    """Six parameter counts in M: with shared layers and without, budget by budget."""
    return [x.parameters / 1e6 for a in optima(constants) for x in (a, unshared(a))]


def errors(six: Iterable[float]) -> list[float]:
    """Signed, in percent of the printed counts."""
    printed = [count for _, *pair in TARGETS for count in pair]
    return [100 * (found / target - 1) for found, target in zip(six, printed, strict=True)]


def mean_error(six: Iterable[float]) -> float:
    return float(np.mean(np.abs(errors(six))))


def worst_error(six: Iterable[float]) -> float:
    return float(np.max(np.abs(errors(six))))


def spelled(constants: Constants) -> str:
    return f"alpha {constants[0]:.2f}:{1 - constants[0]:.2f}, epsilon^2 {constants[1]:g}, power {constants[2]:g}"


# --- commands --------------------------------------------------------------------------------------


def print_optima(constants: Constants = DEFAULT) -> None:
    print(f"{spelled(constants)}\n")
    for (flops, *printed), a in zip(TARGETS, optima(constants), strict=True):
        own = unshared(a)
        blocks = ", ".join(f"{b.layers} x {b.width} (FFN {b.ffn_width})" for b in a.blocks)
        print(f"{flops / 1e9:.0f} G: {blocks}; {a.flops() / 1e9:.2f} GFLOPs, {a.layers} layers, id {a.id}")
        for name, model, target in (("shared", a, printed[0]), ("unshared", own, printed[1])):
            millions = model.parameters / 1e6
            print(f"    {name:<9} {millions:6.2f} M, printed {target} M ({100 * (millions / target - 1):+.1f} %)")
    six = counts(constants)
    print(f"\nmean error {mean_error(six):.2f} %, worst {worst_error(six):.2f} %")


def calibrate() -> None:
    """A grid over the three constants, then ever finer steps around its best."""
    began = time.monotonic()
    with ProcessPoolExecutor() as pool:
        known: dict[Constants, list[float]] = {}

        def evaluate(candidates: Iterable[Constants]) -> None:
            fresh = [c for c in dict.fromkeys(candidates) if c not in known]
            known.update(zip(fresh, pool.map(counts, fresh, chunksize=4), strict=True))

        def rank(constants: Constants) -> tuple[bool, float, float]:
            """Within 8 % everywhere first, then by mean error."""
            six = known[constants]
            return worst_error(six) > 8, round(mean_error(six), 6), abs(np.log(constants[1] / DEFAULT[1]))

        evaluate(itertools.product(SHARES, EPSILONS, POWERS))
        print(f"grid of {len(known)} in {time.monotonic() - began:.0f} s", flush=True)
        for share_step, epsilon_factor, power_step in ((0.05, 1.5, 0.25), (0.02, 1.2, 0.1), (0.01, 1.07, 0.05)):
            for share, epsilon, power in sorted(known, key=rank)[:6]:
                evaluate(
                    (
                        round(share + i * share_step, 3),
                        float(f"{epsilon * epsilon_factor**j:.3g}"),
                        round(power + k * power_step, 3),
                    )
                    for i, j, k in itertools.product((-1, 0, 1), repeat=3)
                    if 0 < share + i * share_step < 1 and power + k * power_step > 0
                )
    print(f"{len(known)} choices in {time.monotonic() - began:.0f} s")
    fitting = [c for c in known if worst_error(known[c]) <= 8]
    close = sum(mean_error(known[c]) <= 4 for c in fitting)
    print(f"{len(fitting)} of them within 8 % everywhere, {close} of those with a mean within 4 %")
    print("\nmean %\tworst %\tconstants\tcounts")
    for constants in sorted(known, key=rank)[:15]:
        six = known[constants]
        print(
            f"{mean_error(six):.2f}\t{worst_error(six):.2f}\t{spelled(constants)}\t{' '.join(f'{x:.1f}' for x in six)}"
        )
    print("\nbest of each power:")
    for power in POWERS:
        constants = min((c for c in known if c[2] == power), key=rank)
        six = known[constants]
        print(
            f"{mean_error(six):.2f}\t{worst_error(six):.2f}\t{spelled(constants)}\t{' '.join(f'{x:.1f}' for x in six)}"
        )


def sensitivity(path: Path, centre: Constants = DEFAULT) -> None:
    """The six counts while one constant moves and the others stay."""
    from matplotlib.figure import Figure

    share, epsilon, power = centre
    sweeps = (
        ("alpha_mha (alpha_ffn = 1 - alpha_mha)", [(x, epsilon, power) for x in np.round(np.arange(0.05, 1, 0.05), 2)]),
        ("epsilon squared", [(share, x, power) for x in np.geomspace(3, 100_000, 28)]),
        ("exponent of the depth penalty", [(share, epsilon, x) for x in np.round(np.arange(0, 5.01, 0.25), 2)]),
    )
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    with ProcessPoolExecutor() as pool:
        for index, (axes, (label, points)) in enumerate(zip(figure.subplots(1, 3, sharey=True), sweeps, strict=True)):
            six = np.array(list(pool.map(counts, points)))  # [points, 6]
            xs = [point[index] for point in points]
            for column, target in enumerate(count for _, *pair in TARGETS for count in pair):
                budget, is_own = divmod(column, 2)
                name = f"{TARGETS[budget][0] / 1e9:.0f} G, {'own weights' if is_own else 'shared'}"
                style = {"color": f"C{budget}", "linestyle": "--" if is_own else "-"}
                axes.plot(xs, six[:, column], marker=".", markersize=3, label=name, **style)
                axes.axhspan(0.92 * target, 1.08 * target, color=f"C{budget}", alpha=0.05, linewidth=0)
                axes.axhline(target, color=f"C{budget}", linewidth=0.6, alpha=0.6)
            axes.axvline(centre[index], color="black", linewidth=0.8, linestyle=":")
            axes.set(xlabel=label, ylim=(35, 140), **({"xscale": "log"} if index == 1 else {}))
            axes.grid(alpha=0.25)
        axes.legend(
            fontsize="small", loc="upper right", title="thin lines: printed, bands: 8 %", title_fontsize="small"
        )
    figure.supylabel("parameters of the exact optimum (M)")
    report.save(figure, path)


def landscape(path: Path) -> None:
    """The mean error over alpha and epsilon, one panel for each exponent."""
    from matplotlib.figure import Figure

    powers = (0.5, 1.0, 2.0, 3.0)
    figure = Figure(figsize=(13, 4), layout="constrained")
    with ProcessPoolExecutor() as pool:
        for axes, power in zip(figure.subplots(1, len(powers), sharey=True), powers, strict=True):
            points = [(share, epsilon, power) for share in SHARES for epsilon in EPSILONS]
            mean = np.array([mean_error(six) for six in pool.map(counts, points, chunksize=4)])
            mesh = axes.pcolormesh(EPSILONS, SHARES, mean.reshape(len(SHARES), -1), vmin=0, vmax=25, cmap="viridis_r")
            axes.set(xscale="log", xlabel="epsilon squared", title=f"exponent {power:g}: best {mean.min():.1f} %")
    figure.supylabel("alpha_mha")
    figure.colorbar(mesh, ax=figure.axes, label="mean error of the six counts (%)")
    report.save(figure, path)


def main() -> None:
    match sys.argv[1:]:
        case ["optima"]:
            print_optima()
        case ["optima", share, epsilon, power]:
            print_optima((float(share), float(epsilon), float(power)))
        case ["calibrate"]:
            calibrate()
        case ["sensitivity", path]:
            sensitivity(Path(path))
        case ["landscape", path]:
            landscape(Path(path))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
