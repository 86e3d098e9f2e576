"""`merino-edge estimate`: estimates a latency table for a board that is not at hand, with a roofline model.

    merino-edge estimate                                        list the boards and their power modes
    merino-edge estimate --check                                compare the roofline with published speeds
    merino-edge estimate --board orin-nano-8gb --mode 25W --space edge --precision int4 --out T.jsonl

`--json` prints one object, which is

    for a table   {"table", "device", "power_mode", "precision", "runtime", "entries", "estimated": true, "unverified",
                  "checked_by": [line], "validation"}
    of the boards {"boards": [{"name", "title", "modes": [...], "sources", "unverified", ...}]}
    --check       {"rows": [merino_edge.jetson.estimate.published_speeds.PublishedSpeed], "summaries": [...],
                  "runtimes": {name: basis}}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli import outputs

if TYPE_CHECKING:
    from rich.console import Console

    from merino_edge.jetson.estimate.boards import Board
    from merino_edge.latency.table import LatencyTable
    from merino_edge.search.costs import CostModel
    from merino_edge.search.space import Space

ADDITIVE_PERCENT = 5.0  # error of a sum of parts above which a warning is printed


def estimate(
    board: Annotated[
        str | None, typer.Option(metavar="BOARD", help="Board to estimate for. Without it the boards are listed.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(metavar="MODE", help="Power mode of the board, with nvpmodel's name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Latency table to write, NAME.jsonl.")] = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE", help="Search space to cover: paper, edge, wide, demo, or a space file. [default: edge]"
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision of the weights: fp32, fp16, int8 or int4. [default: int4]")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="Target of export whose bundle runs: its bytes count, and a search with the table counts the same. "
            "[default: any for TensorRT]",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Runtime whose overhead is assumed: merino-edge, edge-llm, llama.cpp or ollama. [default: merino-edge]"
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Cache and prompt lengths. [default: up to 1024, quick up to 256]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use a small grid.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare the roofline model with published speeds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Estimate a latency table for a board that is not at hand.

    The estimate comes from the board's data and a roofline model. The command also prints how far such estimates are
    from published speeds.
    """
    from merino_edge.errors import InputError
    from merino_edge.latency.table_file import KIND

    table_options = (mode, out, space, precision, target, runtime, lengths, quick or None)
    if check or board is None:
        if (check and board is not None) or any(option is not None for option in table_options):
            hint = "leave out every other option" if check else "add: --board BOARD (merino-edge estimate lists them)"
            raise InputError("--check takes only --json" if check else "no board was named", hint)
        (_check if check else _list)(as_json=as_json)
    elif out is None:
        raise InputError("no file was named for the table", "add: --out T.jsonl")
    else:
        outputs.claim(out, KIND)
        _write(
            board,
            mode,
            out,
            space="edge" if space is None else space,
            precision="int4" if precision is None else precision,
            target=target,
            runtime_name="merino-edge" if runtime is None else runtime,
            lengths=lengths,
            quick=quick,
            as_json=as_json,
        )


def _write(
    board_name: str,
    mode: str | None,
    out: Path,
    *,
    space: str,
    precision: str,
    target: str | None,
    runtime_name: str,
    lengths: str | None,
    quick: bool,
    as_json: bool,
) -> None:
    from merino_edge.cli import console
    from merino_edge.cli.profile_request import parse_lengths
    from merino_edge.errors import InputError
    from merino_edge.jetson.estimate.boards import board
    from merino_edge.jetson.estimate.estimate import estimate as estimate_table
    from merino_edge.jetson.estimate.roofline import Roofline, runtime
    from merino_edge.search import space_file
    from merino_edge.search.builtin_spaces import load_space
    from merino_edge.search.costs import CostModel

    chosen = board(board_name)
    if mode is None:
        modes = ", ".join(m.name for m in chosen.modes)
        raise InputError(f"{chosen.name} has several power modes", f"add: --mode, one of {modes}")
    roofline = Roofline(chosen, chosen.mode(mode), runtime(runtime_name), target)
    grid_lengths, search_space = parse_lengths(lengths), load_space(space)
    needed = _memory_line(search_space, CostModel(precision, target=target), chosen)
    screen = console.stderr()
    with screen.status("estimating"):
        table = estimate_table(
            out,
            search_space,
            space_file.to_dict(search_space),
            precision,
            roofline,
            quick=quick,
            lengths=grid_lengths,
        )
    _print_table(screen, table)
    screen.print(needed, markup=False, soft_wrap=True)
    if as_json:
        header = table.header
        console.print_json(
            {
                "table": str(out),
                "device": header["device"]["name"],
                "power_mode": header["device"]["power_mode"],
                "precision": table.precision,
                "runtime": header["runtime"],
                "entries": len(table.measurements),
                "estimated": table.estimated,
                "unverified": header["unverified"],
                "checked_by": header["checked_by"],
                "validation": table.validation,
            }
        )
    else:
        console.print_line(str(out))


def _memory_line(space: Space, cost_model: CostModel, board: Board) -> str:
    """What the models of the space take of the board's memory. Raises UnsupportedError where none of them fits."""
    import dataclasses

    from merino_edge.errors import UnsupportedError
    from merino_edge.search.budget import Metric

    cost_model.check_blocks(space, ())
    metric, peak_mb = cost_model.resolve(Metric("peak_mb"), space), []
    for template, model in enumerate(space.models):
        cost = cost_model.metric_cost(metric, space.templates[template].vocabulary)
        widths = space.width_range(template)
        choices = space.block_choices[space.first_choice[widths.start] : space.first_choice[widths.stop]]
        largest = max(choices, key=lambda b: (b.width, b.weight_layers, b.kv_heads, b.ffn_width))
        for blocks in (choices[:1] * space.blocks[0], (largest,) * space.blocks[-1]):
            peak_mb.append(cost.value(dataclasses.replace(model, blocks=blocks)))
    least, most, whose = min(peak_mb), max(peak_mb), f" as stored for {cost_model.target}" if cost_model.target else ""
    line = f"models of space {space.name} take {least:,.0f} to about {most:,.0f} MB{whose}"
    if board.memory_bytes is None:
        return f"{line}; the board's memory is unknown"
    memory_mb = board.memory_bytes / 1e6
    if least > memory_mb:
        raise UnsupportedError(f"{line}, {board.name} has {memory_mb:,.0f} MB", "choose another --board or --space")
    warning = "warning: " if most > memory_mb else ""
    return f"{warning}{line} of the board's {memory_mb:,.0f} MB, which its system shares"


def _print_table(screen: Console, table: LatencyTable) -> None:
    def say(text: str) -> None:
        screen.print(text, markup=False, soft_wrap=True)

    header = table.header
    say(f"{len(table.measurements)} entries, estimated, not measured: {header['device']['name']}, "
        f"{header['device']['power_mode']}, {header['precision']}")  # fmt: skip
    say(f"runtime {header['runtime']}: {header['runtime_basis']}")
    if header["unverified"]:
        say(f"unverified: {', '.join(header['unverified'])}")
    for mode, figures in table.validation.items():
        say(
            f"additivity of the estimate in {mode}: its sums against {figures['models']} whole models of the roofline, "
            f"MAPE {figures['mape_percent']:.1f}%, max {figures['max_percent']:.1f}%"
        )
        if figures["mape_percent"] > ADDITIVE_PERCENT:
            say(f"warning: in {mode} this estimate is not the sum of its parts")
    for mode, figures in table.validation.items():
        if figures["published_models"]:
            say(
                f"such estimates in {mode} against {figures['published_models']} published speeds that nothing was "
                f"fitted to: MAPE {figures['published_mape_percent']:.1f}%, times {figures['low_percent']:+.1f} to "
                f"{figures['high_percent']:+.1f}%"
            )
        else:
            say(f"such estimates in {mode}: no published speed to compare with")
    for line in header["checked_by"]:
        say(line)
    say("line by line: merino-edge estimate --check")


# --- the boards ------------------------------------------------------------------------------------


def _list(*, as_json: bool) -> None:
    import dataclasses

    from rich.table import Table

    from merino_edge.cli import console
    from merino_edge.jetson.estimate.boards import BOARDS

    def document(board: Board) -> dict[str, Any]:
        modes = [
            {
                **dataclasses.asdict(mode),
                "bandwidth_gb_s": board.bandwidth_gb_s(mode),
                "fp16_tflops": board.fp16_tflops(mode),
                "unverified": list(board.unverified_in(mode)),
            }
            for mode in board.modes
        ]
        return {**dataclasses.asdict(board), "modes": modes}

    if as_json:
        console.print_json({"boards": [document(board) for board in BOARDS]})
        return
    screen = console.stdout(soft_wrap=True)
    listed = Table("board", "mode", "SMs", "MHz", "GB/s", "TFLOPS", "L2 KiB", "CPU MHz", box=None, pad_edge=False)
    for board in BOARDS:
        for index, mode in enumerate(board.modes):
            listed.add_row(
                "" if index else board.name,
                mode.name + ("*" if board.unverified or mode.unverified else ""),
                str(mode.sm_count),
                f"{mode.gpu_mhz:g}",
                f"{board.bandwidth_gb_s(mode):.1f}",
                f"{board.fp16_tflops(mode):.2f}",
                "?" if board.l2_bytes is None else str(board.l2_bytes // 1024),
                "?" if mode.cpu_mhz is None else f"{mode.cpu_mhz:g}",
            )
    screen.print(listed)
    screen.print("TFLOPS: dense FP16, theoretical. ?: no source gives it. *: unverified, without a good source:")
    for board in BOARDS:
        marks = {
            mark: [m.name for m in board.modes if mark in m.unverified] for m in board.modes for mark in m.unverified
        }
        notes = [*board.unverified, *(f"{mark} ({', '.join(names)})" for mark, names in marks.items())]
        if notes:
            screen.print(f"  {board.name}: {', '.join(notes)}")
    screen.print("next: merino-edge estimate --board BOARD --mode MODE --space edge --precision int4 --out T.jsonl")


# --- the check -------------------------------------------------------------------------------------


def _check(*, as_json: bool) -> None:
    from itertools import groupby

    from rich.table import Table

    from merino_edge.cli import console
    from merino_edge.jetson.estimate.published_speeds import rows, summaries
    from merino_edge.jetson.estimate.roofline import RUNTIMES

    compared = rows()
    if as_json:
        bases = {runtime.name: runtime.basis for runtime in RUNTIMES}
        document = {"rows": [r.to_dict() for r in compared], "summaries": summaries(compared), "runtimes": bases}
        console.print_json(document)
        return
    screen = console.stdout(soft_wrap=True)
    for kind, group in groupby(compared, lambda row: f"{row.framework} {row.mode}"):
        screen.print(kind)
        listed = Table("model", "board", "power mode", "tok/s", "roofline", "error %", "", box=None, pad_edge=False)
        for row in group:
            d = row.to_dict()
            listed.add_row(
                f"{row.model} {row.storage.name}",
                row.board,
                row.power_mode,
                f"{row.tokens_per_s:g}",
                f"{d['predicted_tokens_per_s']:.1f}",
                f"{d['error_percent']:+.0f}",
                "fitted" if row.fitted else "",
            )
        screen.print(listed, "")
    figures = Table("framework", "rows", "MAPE %", "max %", "bias %", "Kendall tau", box=None, pad_edge=False)
    for s in summaries(compared):
        tau = "-" if s["kendall_tau"] is None else f"{s['kendall_tau']:.2f}"
        numbers = [f"{s[name]:.1f}" for name in ("mape_percent", "max_percent", "bias_percent")]
        figures.add_row(f"{s['framework']} {s['mode']}", f"{s['models']} {s['rows']}", *numbers, tau)
    screen.print(figures)
    screen.print('\n"tested" leaves out the rows that constants were fitted to. Where the constants come from:')
    for runtime in RUNTIMES:
        screen.print(f"  {runtime.name}: {runtime.basis}")
