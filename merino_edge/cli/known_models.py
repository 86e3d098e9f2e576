"""`merino-edge import --list`: models by name, with their size and the boards that have the memory for them.

`--json` prints {"positions": N, "models": [{"name", "parameters", "download_bytes", "running_bytes", "gated",
"boards": [...]}]}; `running_bytes` is at int4 with a cache of so many positions, `boards` are those that fit it.
"""

from __future__ import annotations

POSITIONS = 4096


def print_known(*, as_json: bool) -> None:
    """Print the models that merino-edge knows by name, the smallest first."""
    from rich.table import Table

    from merino_edge.cli import console
    from merino_edge.convert.known_models import KNOWN, SYSTEM_BYTES
    from merino_edge.jetson.estimate.boards import BOARDS

    sized = sorted({board.memory_bytes for board in BOARDS if board.memory_bytes})
    smallest = {size: next(board for board in BOARDS if board.memory_bytes == size) for size in sized}
    models = sorted(KNOWN, key=lambda model: model.parameters)
    if as_json:
        rows = [
            {
                "name": model.name,
                "parameters": model.parameters,
                "download_bytes": model.download_bytes,
                "running_bytes": model.running_bytes(POSITIONS),
                "gated": model.gated,
                "boards": [
                    board.name for board in BOARDS if board.memory_bytes and model.fits(board.memory_bytes, POSITIONS)
                ],
            }
            for model in models
        ]
        console.print_json({"positions": POSITIONS, "models": rows})
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for heading in ("weights", "download", "runs in", "board"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in models:
        least = next((f"{size // 2**30} GB" for size in sized if model.fits(size, POSITIONS)), "none")
        millions, gigabytes = f"{model.parameters / 1e6:,.0f} M", f"{model.download_bytes / 1e9:.2f} GB"
        table.add_row(model.name, millions, gigabytes, f"{model.running_bytes(POSITIONS) / 1e9:.2f} GB", least)
    screen = console.stdout()
    screen.print(table)
    boards = "; ".join(f"{size // 2**30} GB: {smallest[size].title}" for size in sized)
    screen.print(
        f"runs in: at int4, a cache of {POSITIONS:,} positions; a board needs {SYSTEM_BYTES / 1e9:.1f} GB beside it. "
        f"board: the least memory; for a board with less the model is too large. "
        f"Boards: {boards}. Gated: {', '.join(model.name for model in models if model.gated)}.",
        soft_wrap=True,
    )
    console.stderr().print("next: merino-edge import NAME --out CHECKPOINT", markup=False)
