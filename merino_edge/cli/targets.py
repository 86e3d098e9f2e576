"""`merino-edge targets`: lists where a bundle can run, and what export writes for each place.

`--json` prints {"targets": [{"name", "boards", "system", "python", "library", "opsets": [oldest, newest], "lowerings":
[...], "precisions": [...], "fused_attention", "known": [...]}], "operators": {name: release}}.
"""

from __future__ import annotations

from typing import Annotated

import typer


def targets(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """List the boards and runtimes that export can target.

    For each target it prints the TensorRT release, the opsets and lowerings of the graph, and known bugs.
    """
    from merino_edge.errors import require

    require("onnx_ir", "export")
    from rich.table import Table

    from merino_edge.cli import console
    from merino_edge.export.operators import OPERATORS_SINCE, version_text
    from merino_edge.export.targets import PLATFORMS

    if as_json:
        rows = [
            {
                "name": p.name,
                "boards": p.boards,
                "system": p.system,
                "python": p.python,
                "library": p.library,
                "opsets": list(p.opsets),
                "lowerings": list(p.lowerings),
                "precisions": list(p.precisions),
                "fused_attention": p.fused_attention,
                "known": list(p.known_issues),
            }
            for p in PLATFORMS.values()
        ]
        console.print_json(
            {"targets": rows, "operators": {name: version_text(since) for name, since in OPERATORS_SINCE.items()}}
        )
        return
    screen = console.stdout()
    table = Table(box=None, pad_edge=False)
    for heading in ("target", "boards", "system", "parsed by", "opsets", "lowering", "precisions"):
        table.add_column(heading, overflow="fold")
    for p in PLATFORMS.values():
        opsets = f"{p.opsets[0]}-{p.opsets[1]}"
        able = ", ".join(p.lowerings)
        table.add_row(p.name, p.boards, p.system, p.library, opsets, able, " ".join(p.precisions))
    screen.print(table)
    for p in PLATFORMS.values():
        for line in p.known_issues:
            screen.print(f"{p.name}: {line}", soft_wrap=True)
