"""`merino-edge export-hf`: exports a checkpoint as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merino_edge.cli import outputs


def export_hf(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder to read.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help=outputs.FORCE_HELP)] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder.

    transformers loads the folder, and so does every tool that reads its format.
    """
    from merino_edge.cli import console
    from merino_edge.convert.to_huggingface import export_to_huggingface
    from merino_edge.kind import TRANSFORMERS

    outputs.claim(out, TRANSFORMERS, force=force)
    with console.stderr().status("writing"):
        written = export_to_huggingface(checkpoint, out)
    a = written.architecture
    if written.copied_layers:
        console.stderr().print(
            f"note: {written.model} shares no weights between layers: {written.copied_layers} of {a.layers} layers "
            f"are copies of another layer",
            markup=False,
            soft_wrap=True,
        )
    if json:
        document = {"out": str(out), "family": written.family, "model": written.model, "parameters": a.parameters}
        console.print_json({**document, "copied_layers": written.copied_layers})
        return
    console.print_line(f"{out}: {written.model}, {a.parameters / 1e6:.1f} M parameters, {a.layers} layers")
    console.stderr().print(
        f'next: transformers.AutoModelForCausalLM.from_pretrained("{out}")', markup=False, soft_wrap=True
    )
