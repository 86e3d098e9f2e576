"""`merino-edge demo`: two boards, two models. It runs every step on this machine, in about seven minutes on two cores.

It runs the commands that a person would type and prints each one. The same command goes on after an interruption
(merino_edge.cli.demo_steps). The folder `--out` then holds index.html and summary.json (merino_edge.cli.demo_report),
corpus.txt, and of this machine and of the other board a table and a model: table.jsonl, architecture.json, board.jsonl,
board-architecture.json. The model of this machine is in checkpoint/ and bundle/, a hand-picked rival in by-hand/ and
by-hand-bundle/.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli import outputs, units

if TYPE_CHECKING:
    from rich.console import Console

    from merino_edge.cli.demo_steps import Steps
    from merino_edge.search.space import Space

PRECISION = "int8"
BUDGET = "30%"  # with 25 % the estimated board has slack for a layer that it cannot have
BATCH, SEQUENCE = 16, 128
PROMPT_TOKENS, NEW_TOKENS = 127, 128  # of the benchmark: its steps read as many positions as the predicted one
# Seconds of the steps on two quiet cores, but for the profile and the training.
SECONDS = {"threads": 6, "estimate": 4, "search": 6, "search for the board": 6, "prices": 8}
SECONDS |= {"export": 12, "by hand": 3, "export by hand": 12, "bench": 12, "stories": 12}
AROUND_PROFILE_S = 20  # the start of a profile, its calibration and its plot
TRAINING_SHARE = 0.4  # of the speed of a product of large matrices that a training of so small a model reaches


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    decode_ms: Annotated[
        str,
        typer.Option(
            metavar="MS",
            help="Budget of a generated token on each board, in ms or as a share of the way from the fastest model to "
            "the best.",
        ),
    ] = BUDGET,
    space: Annotated[str, typer.Option(metavar="SPACE", help="Search space, by its name or as a space file.")] = "demo",
    board: Annotated[str, typer.Option(metavar="BOARD", help="The other board.")] = "orin-nano-8gb",
    mode: Annotated[str, typer.Option(metavar="MODE", help="The power mode of that board.")] = "15W",
    minutes: Annotated[
        float,
        typer.Option(
            parser=units.minutes("--minutes"), metavar="MINUTES", help="Minutes of the profile of this machine."
        ),
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 400,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the models. [default: as is fastest]")] = None,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help=outputs.SAME_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run every step on this machine, from profile to generate.

    It profiles this CPU, estimates another board, and searches for both: two boards, two models. It trains, exports
    and measures the one for this machine, and ends with a page. The same command goes on after Ctrl-C.
    """
    from merino_edge import artefact, limits
    from merino_edge.cli import console, demo_report
    from merino_edge.cli.demo_steps import KIND, Steps
    from merino_edge.errors import InputError, Interrupted, require_all
    from merino_edge.jetson.estimate.boards import board as board_named
    from merino_edge.runtime.thread_tuning import this_machine
    from merino_edge.search.budget import parse_quantity
    from merino_edge.search.builtin_spaces import load_space
    from merino_edge.search.relative_budget import PERCENT, parse_percent

    require_all({"train": ["torch", "safetensors"], "export": ["onnx", "onnx_ir"], "plot": ["matplotlib"]})
    outputs.claim(out, KIND, resumes=True)
    limits.check_range("steps", steps, 1, limits.MAX_ITERATIONS)
    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    if not 0 < minutes <= limits.MAX_MINUTES:
        raise InputError(f"--minutes is {minutes}", f"give a positive number up to {limits.MAX_MINUTES}")
    (parse_percent if decode_ms.endswith(PERCENT) else parse_quantity)(decode_ms, "--decode-ms")
    board_named(board).mode(mode)
    searched = load_space(space)
    screen = console.stderr()
    run = Steps(out, this_machine(), screen)
    _print_estimate(screen, run, searched, minutes, steps)
    try:
        summary = _run(run, searched, space, (board, mode), decode_ms, minutes, steps, threads)
    except KeyboardInterrupt:
        kept = sum(run.done(name) for name in run.records)
        hint = "the same command goes on"
        raise Interrupted(f"interrupted; {kept} steps are done and stay in {out}", hint) from None
    artefact.write_json(out / "summary.json", "demo", summary)
    demo_report.write_page(summary, out / "index.html")
    if as_json:
        console.print_json(summary)
    else:
        console.stdout().print(demo_report.terminal(summary, out))


def _run(
    run: Steps,
    searched: Space,
    space: str,
    board: tuple[str, str],
    decode_ms: str,
    minutes: float,
    steps: int,
    threads: int | None,
) -> dict[str, Any]:
    """Run every step and return the summary."""
    from merino_edge import artefact
    from merino_edge.cli import demo_models, demo_report
    from merino_edge.data.tiny_stories import TWO_FRIENDS, tiny_stories

    out = run.folder

    def corpus() -> dict[str, Any]:
        text = tiny_stories(cast=TWO_FRIENDS)
        artefact.write_text(out / "corpus.txt", text)
        return {"bytes": len(text.encode())}

    run.own("corpus", corpus, made=["corpus.txt"], facts={"cast": TWO_FRIENDS})
    if threads is None:
        measured = run.own(
            "threads", lambda: demo_models.fastest_threads(searched, PRECISION), facts={"space": space, **run.machine}
        )
        threads = int(measured["threads"])
        speeds = ", ".join(f"{count}: {speed:,.0f}" for count, speed in measured["tokens_per_s"].items())
        run.console.print(f"tokens/s by CPU threads: {speeds}; {threads} it is", highlight=False)
    run.verb(
        "profile",
        "profile",
        made=["table.jsonl", "table.png"],
        begun=["table.jsonl"],
        measured=True,
        space=space,
        minutes=minutes,
        precision=PRECISION,
        threads=threads,
        exit_zero=True,
        out=out / "table.jsonl",
        plot=out / "table.png",
    )
    run.verb(
        "estimate",
        "estimate",
        made=["board.jsonl"],
        board=board[0],
        mode=board[1],
        space=space,
        precision=PRECISION,
        out=out / "board.jsonl",
    )
    for name, table, model in (
        ("search", "table.jsonl", "architecture"),
        ("search for the board", "board.jsonl", "board-architecture"),
    ):
        run.verb(
            name,
            "search",
            reads=[table],
            made=[f"{model}.json", f"{model}.png"],
            space=space,
            table=out / table,
            decode_ms=decode_ms,
            precision=PRECISION,
            no_prices=True,  # a step of its own keeps them
            out=out / f"{model}.json",
            plot=out / f"{model}.png",
        )
    found = ["architecture.json", "board-architecture.json"]
    prices = run.own("prices", lambda: demo_models.prices_of([out / name for name in found]), reads=found, facts={})
    trained = run.verb(
        "train",
        "train",
        out / "architecture.json",
        reads=["architecture.json", "corpus.txt"],
        made=["checkpoint"],
        begun=["checkpoint/state/state.json", "checkpoint/training.json"],
        corpus=out / "corpus.txt",
        steps=steps,
        batch=BATCH,
        sequence=SEQUENCE,
        learning_rate="3e-3",
        out=out / "checkpoint",
    )
    rival = run.own(
        "by hand",
        lambda: demo_models.write_rival(out / "architecture.json", out / "checkpoint", out / "by-hand"),
        reads=["architecture.json", "checkpoint"],
        made=["by-hand"],
        facts={},
    )
    context = searched.contexts[-1]
    exported = {}
    for name, checkpoint, bundle in (
        ("export", "checkpoint", "bundle"),
        ("export by hand", "by-hand", "by-hand-bundle"),
    ):
        exported[name] = run.verb(
            name,
            "export",
            out / checkpoint,
            reads=[checkpoint],
            made=[bundle],
            precision=PRECISION,
            context=context,
            threads=threads,
            out=out / bundle,
        )
    speed = run.verb(
        "bench",
        "bench",
        out / "bundle",
        reads=["bundle", "by-hand-bundle"],
        made=[],
        measured=True,
        against=out / "by-hand-bundle",
        prompt_tokens=0,
        new_tokens=min(NEW_TOKENS, context // 2),
        depth=min(PROMPT_TOKENS, context // 2 - 1),
        threads=threads,
    )
    stories = run.own(
        "stories", lambda: demo_models.draw_stories(out / "bundle", threads), reads=["bundle"], made=[], facts={}
    )
    return demo_report.summary(
        run, threads=threads, prices=prices, trained=trained, rival=rival, parity=exported["export"]["parity"],
        speed=speed, stories=stories,
    )  # fmt: skip


def _print_estimate(screen: Console, run: Steps, space: Space, minutes: float, steps: int) -> None:
    """Print how long what is left of the demo will take here, and which steps are kept."""
    from merino_edge.cli import demo_models

    cores = len(os.sched_getaffinity(0))
    flops = 6 * demo_models.middle_parameters(space) * BATCH * SEQUENCE * steps
    seconds = {**SECONDS, "profile": 60 * minutes + AROUND_PROFILE_S}
    seconds["train"] = flops / (TRAINING_SHARE * demo_models.matrix_flops_per_s())
    kept = [name for name in run.records if run.done(name)]
    left_s = sum(each for name, each in seconds.items() if name not in kept)
    screen.print(
        f"about {max(1, round(left_s / 60))} minutes on {cores} cores"
        + (f", {len(kept)} steps are done and kept" if kept else "")
        + "; Ctrl-C keeps what is done, and the same command goes on",
        highlight=False,
        soft_wrap=True,
    )
