"""`merino-edge search`: the architecture with the highest score within budgets.

Writes an architecture artefact (merino_edge.architecture) with how it was found:

    "score": {"total", "mha", "ffn", "raw", "hyperparameters": {"alpha_mha", "alpha_ffn", "epsilon_squared", ...}},
    "costs": {"parameters", "weight_mb", "flops", "decode_ms"?, "prefill_ms"?}, "precision": "fp16",
    "budgets": {the bounded ones of the same}, "solver": "evolution", "solver_options": {"iterations", ...}, "seed": 0,
    "space": {"name", "size", "sha256"}, "table": {"sha256", "estimated"} or null
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def search(
    out: Annotated[Path, typer.Option(help="The architecture to write, NAME.json.")],
    space: Annotated[str, typer.Option(help="paper, demo, or a space file.")] = "paper",
    solver: Annotated[str, typer.Option(help="evolution (the paper's algorithm).")] = "evolution",
    table: Annotated[Path | None, typer.Option(help="A latency table made by: merino-edge profile.")] = None,
    decode_ms: Annotated[str | None, typer.Option(metavar="MS", help="Most time per generated token.")] = None,
    prefill_ms: Annotated[str | None, typer.Option(metavar="MS", help="Most time for the table's prompt.")] = None,
    params: Annotated[str | None, typer.Option(metavar="N", help="Most stored parameters, as 60M.")] = None,
    flops: Annotated[
        str | None, typer.Option(metavar="N", help="Most FLOPs per 1024 tokens without head, as 60G.")
    ] = None,
    weight_mb: Annotated[str | None, typer.Option(metavar="MB", help="Most weight megabytes at --precision.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, int8 or int4. [default: the table's, else fp16]")
    ] = None,
    shared: Annotated[
        bool | None,
        typer.Option("--shared/--no-shared", help="One set of weights per block. [default: the space's]"),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Mutations to try.")] = 100_000,
    population: Annotated[int, typer.Option(help="Architectures kept.")] = 512,
    parents: Annotated[int, typer.Option(help="The best of them, that are mutated.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed finds the same architecture.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also plot the search.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the architecture with the highest entropy score within any combination of budgets."""
    import dataclasses

    from merino_edge import architecture, artefact
    from merino_edge.cli import console
    from merino_edge.errors import InputError, MissingExtraError
    from merino_edge.latency_table import LatencyTable
    from merino_edge.search import report
    from merino_edge.search.budget import OPTIONS, Budget, parse_quantity
    from merino_edge.search.entropy import Hyperparameters
    from merino_edge.search.evolution import evolve
    from merino_edge.search.space import load_space

    if solver != "evolution":
        raise InputError(f"there is no solver {solver!r}", "choose --solver evolution")
    given = {
        "parameters": params,
        "weight_mb": weight_mb,
        "flops": flops,
        "decode_ms": decode_ms,
        "prefill_ms": prefill_ms,
    }
    quantities = {metric: parse_quantity(text, OPTIONS[metric]) for metric, text in given.items() if text is not None}
    budget = Budget(**quantities)
    chosen = load_space(space)
    if shared is not None:
        chosen = dataclasses.replace(chosen, shared=shared)
    latencies = LatencyTable.load(table) if table else None
    precision = precision or (latencies.precision if latencies else "fp16")
    hyperparameters = Hyperparameters()

    screen = console.stderr()
    with console.progress(screen) as bar:
        task = bar.add_task("searching", total=iterations, note="", visible=False)
        result = evolve(
            chosen,
            budget,
            latencies=latencies,
            precision=precision,
            hyperparameters=hyperparameters,
            iterations=iterations,
            population=population,
            parents=parents,
            seed=seed,
            on_progress=lambda done, best: bar.update(
                task, completed=done, visible=True, note=f"best score {best:.1f}"
            ),
        )
        bar.update(task, completed=iterations)

    document = architecture.save(
        out,
        result.architecture,
        score={**dataclasses.asdict(result.score), "hyperparameters": dataclasses.asdict(hyperparameters)},
        costs=result.costs,
        precision=precision,
        budgets=budget.limits,
        solver=solver,
        solver_options={"iterations": iterations, "population": population, "parents": parents},
        seed=seed,
        space={
            "name": chosen.name,
            "size": chosen.size,
            "sha256": artefact.sha256_text(artefact.canonical_json(chosen.to_dict())),
        },
        table={"sha256": latencies.sha256, "estimated": latencies.estimated} if latencies else None,
    )
    screen.print(report.summary(result, budget, estimated=latencies is not None and latencies.estimated))
    if plot:
        try:
            report.plot(result, budget, plot)
        except MissingExtraError as error:
            screen.print(f"no plot: {error}", markup=False, soft_wrap=True)
    if as_json:
        console.print_json(document)
    else:
        console.print_line(str(out))
