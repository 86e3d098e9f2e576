"""`merino-edge study`: trains many small models on equal tokens and tests which training-free score ranks them best.

It writes STUDY/report.json (merino_edge.search.study.report), report.md and report.png. The study folder itself belongs
to merino_edge.training.study_runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli import outputs

if TYPE_CHECKING:
    from rich.console import Console

    from merino_edge.search.study.scores import Trained
    from merino_edge.training.config import TrainingConfig
    from merino_edge.training.study_runs import Plan

TRAINING = "Training"  # a panel of the help
PROXY_SEQUENCES = 8  # sequences of the corpus for the scores that need weights


def study(
    folder: Annotated[Path, typer.Argument(metavar="STUDY", help="Study folder to begin or to continue.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Training text, as for train. Without it the report is made again."),
    ] = None,
    space: Annotated[
        str, typer.Option(metavar="SPACE", help="Search space to sample from: a name or a space file.")
    ] = "study",
    models: Annotated[
        int, typer.Option(help="Architectures to sample, spread evenly over the logarithm of their size.")
    ] = 32,
    min_params: Annotated[
        str,
        typer.Option("--from", "--min-params", metavar="N", help="Fewest parameters of the decoder, as 5K."),
    ] = "10K",
    max_params: Annotated[
        str, typer.Option("--to", "--max-params", metavar="N", help="Most parameters of the decoder.")
    ] = "1M",
    model: Annotated[
        list[Path] | None,
        typer.Option(metavar="A.json", help="Architecture to train instead of sampled ones. Repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Training runs of each architecture.")] = 1,
    seed: Annotated[int, typer.Option(help="Random seed of sampling, split halves and intervals.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING)] = 1500,
    batch: Annotated[
        int, typer.Option("--batch", "--batch-size", help="Sequences per step.", rich_help_panel=TRAINING)
    ] = 16,
    sequence: Annotated[
        int, typer.Option("--sequence", "--sequence-length", help="Tokens per sequence.", rich_help_panel=TRAINING)
    ] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 3e-3,
    optimizer: Annotated[
        str, typer.Option(help="muon or adamw. See docs/study.md.", rich_help_panel=TRAINING)
    ] = "muon",
    precision: Annotated[
        str,
        typer.Option(
            help="Precision of the computation: fp32, bf16 or auto. Small models are faster in fp32.",
            rich_help_panel=TRAINING,
        ),
    ] = "fp32",
    workers: Annotated[
        int | None, typer.Option(help="Training runs at a time. [default: all cores / --threads]")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each training run.")] = 1,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help=outputs.SAME_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Train many small models and test how well scores rank them.

    Every model is trained on the same number of tokens. With --model the report compares the given architectures.
    A study that was killed continues with the same command.
    """
    import os

    from merino_edge import limits
    from merino_edge.cli import console
    from merino_edge.errors import require_all
    from merino_edge.search.budget import parse_quantity

    require_all({"train": ["torch", "safetensors"], "study": ["scipy", "matplotlib"]})
    from merino_edge.training import study_runs

    outputs.claim(folder, study_runs.KIND, resumes=True)
    limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // threads)
    limits.check_range("workers", workers, 1, limits.MAX_THREADS)
    limits.check_range("seeds", seeds, 1, 1000)
    fewest, most = parse_quantity(min_params, "--from"), parse_quantity(max_params, "--to")
    err = console.stderr()
    if corpus:
        from merino_edge.training.config import TrainingConfig

        checked_there: dict[str, Any] = {"precision": precision, "optimizer": optimizer}
        config = TrainingConfig(
            steps=steps,
            batch=batch,
            sequence=sequence,
            micro_batch=batch,
            learning_rate=learning_rate,
            warmup=steps // 10,
            **checked_there,
        )
        plan = _plan(
            config,
            model or [],
            space=space,
            models=models,
            min_params=fewest,
            max_params=most,
            seeds=seeds,
            seed=seed,
        )
        study_runs.open_study(folder, plan, corpus)
        _train(folder, plan, workers, threads, err)
    else:
        plan = study_runs.load(folder)
    document = report(folder, plan, seed, err)
    if as_json:
        console.print_json(document)
    else:
        console.print_line((folder / "report.md").read_text())


def _plan(
    config: TrainingConfig,
    paths: list[Path],
    *,
    space: str,
    models: int,
    min_params: float,
    max_params: float,
    seeds: int,
    seed: int,
) -> Plan:
    """The study of the architectures at `paths`, or else of `models` sampled ones. Raises InputError, ArtefactError."""
    from merino_edge import architecture
    from merino_edge.errors import InputError
    from merino_edge.search.builtin_spaces import load_space
    from merino_edge.search.study.sampling import stratified_sample
    from merino_edge.training.study_runs import Plan

    if paths:
        loaded, names = [architecture.load(path)[0] for path in paths], [path.stem for path in paths]
        if len({a.id for a in loaded}) < len(loaded):
            raise InputError("one architecture was given twice", "give each once; --seeds trains it more often")
        return Plan(tuple(loaded), tuple(range(seeds)), config, None, tuple(names))
    sampled = stratified_sample(
        load_space(space), models, seed=seed, min_parameters=min_params, max_parameters=max_params
    )
    return Plan(tuple(sampled), tuple(range(seeds)), config, space)


def _train(folder: Path, plan: Plan, workers: int, threads: int, err: Console) -> None:
    from merino_edge.cli import console
    from merino_edge.training import study_runs

    runs = study_runs.runs(folder, plan)
    done = sum(run.finished for run in runs)
    with console.progress(err) as bar:
        task = bar.add_task("study", total=len(runs), completed=done, note=f"{workers} at a time")

        def on_run(run: study_runs.Run, training: dict[str, Any]) -> None:
            note = f"{run.architecture.id} seed {run.seed}: loss {training['validation_loss']:.3f}"
            bar.update(task, advance=1, note=note)

        study_runs.train_all(folder, plan, workers, threads, on_run)


def trained(folder: Path, plan: Plan) -> list[Trained]:
    """The architectures whose runs are finished for every seed, with their losses. Raises ArtefactError."""
    from merino_edge import artefact, checkpoint
    from merino_edge.search.study.scores import Trained
    from merino_edge.training import study_runs
    from merino_edge.training.forms import Trained as TrainedForm

    losses: dict[str, list[float]] = {}
    for run in study_runs.runs(folder, plan):
        if run.finished:
            document = artefact.read_json(run.folder / "training.json", checkpoint.KIND, form=TrainedForm)
            losses.setdefault(run.architecture.id, []).append(document["validation_loss"])
    return [
        Trained(a, tuple(losses[a.id]))
        for a in plan.architectures
        if len(losses.get(a.id, ())) == len(plan.seeds) and all(map(math.isfinite, losses[a.id]))
    ]


def report(folder: Path, plan: Plan, seed: int, err: Console) -> dict[str, Any]:
    """Write and return the report over the trained models. Raises InputError where they are too few."""
    from merino_edge import artefact

    models = trained(folder, plan)
    if len(models) < len(plan.architectures):
        err.print(f"note: {len(models)} of {len(plan.architectures)} architectures are trained", markup=False)
    fields, text = _compared(models, plan) if plan.names else _ranked(folder, models, plan, seed, err)
    artefact.write_text(folder / "report.md", text)
    return artefact.write_json(folder / "report.json", "study-report", fields)


def _compared(models: list[Trained], plan: Plan) -> tuple[dict[str, Any], str]:
    """The report over given models: each is compared with the first."""
    from merino_edge.search.study import comparison

    name_of = {a.id: name for a, name in zip(plan.architectures, plan.names, strict=True)}
    rows = comparison.comparison(models, [name_of[model.architecture.id] for model in models])
    return {"comparison": comparison.comparison_fields(rows)}, comparison.comparison_table(rows, models)


def _ranked(folder: Path, models: list[Trained], plan: Plan, seed: int, err: Console) -> tuple[dict[str, Any], str]:
    """The report over sampled models: how well each score ranks them."""
    import torch

    from merino_edge.data.corpus import load
    from merino_edge.pytorch import proxies
    from merino_edge.search.study import calibration, rank_correlation
    from merino_edge.search.study import report as study_report
    from merino_edge.search.study import scores as studies

    studies.losses(models)  # refuses too few models before the slow scores
    tokens, _ = load(folder / "corpus").validation(PROXY_SEQUENCES, plan.config.sequence)
    with err.status("scores that need weights") as status:
        columns: dict[str, list[float]] = {}
        for number, model in enumerate(models):
            status.update(f"scores that need weights: {number} of {len(models)}")
            for name, value in proxies.scores(model.architecture, torch.from_numpy(tokens), plan.seeds).items():
                columns.setdefault(name, []).append(value)
        status.update("calibration")
        rows = studies.table(models, columns, seed)
        fit = calibration.calibrate(models, seed=seed) if len(models) >= 2 * rank_correlation.MIN_MODELS else None
    study_report.figure(models, rows, folder / "report.png")
    document = study_report.document(models, rows, fit)
    parts = [study_report.scores_table(rows)]
    if (again := studies.repeatability(models, seed)) is not None:
        document["repeatability"] = study_report.agreement_fields(again)
        cells = " / ".join(study_report.agreement_cells(again))
        parts.append(f"One half of the seeds against the other (Spearman / Kendall / of like size): {cells}\n")
    if fit is not None:
        parts += [study_report.calibration_tables(fit), study_report.stability_table(fit)]
    return document, "\n".join(parts)
