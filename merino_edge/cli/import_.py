"""`merino-edge import`: imports a pretrained model as a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from merino_edge.cli import outputs


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face folder (safetensors), GGUF file, a name of the hub such as Qwen/Qwen3-0.6B "
            "(@REVISION and :FILE.gguf may follow), or smollm2-135m-instruct.",
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Checkpoint folder to write.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="The model that a LoRA adapter belongs to.")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Chat template (Jinja) in place of the model's own; an empty file is none."),
    ] = None,
    known: Annotated[
        bool, typer.Option("--list", help="List models by name, with their size and which boards have the memory.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help=outputs.FORCE_HELP)] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Import a Hugging Face or GGUF model as a checkpoint."""
    from merino_edge import artefact, checkpoint, limits
    from merino_edge.cli import console
    from merino_edge.convert.import_model import import_model as convert
    from merino_edge.convert.pretrained import NAME, fetch_smollm2, is_name
    from merino_edge.errors import InputError

    if known:
        from merino_edge.cli.known_models import print_known

        print_known(as_json=json)
        return
    if not source or out is None:
        missing = "MODEL" if not source else "--out CHECKPOINT"
        raise InputError(
            f"{missing} is missing", "run: merino-edge import MODEL --out CHECKPOINT, or see import --list"
        )
    outputs.claim(out, checkpoint.KIND, force=force)
    if is_name(source):
        with console.stderr().status(f"fetching {NAME} (93 MB)"):
            source = str(fetch_smollm2())
    template = None if chat_template is None else artefact.read_text(chat_template, limits.MAX_TEMPLATE_BYTES)
    notes: list[str] = []
    with console.progress() as bar:
        task = bar.add_task("reading weights", total=None, note="")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        a = convert(
            source,
            out,
            partial(show, "reading weights"),
            base=base,
            chat_template=template,
            on_note=notes.append,
            on_bytes=lambda done, total: show("downloading MB", done // 10**6, total // 10**6),
        )
    for note in notes:
        console.stderr().print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if json:
        console.print_json(
            {"checkpoint": str(out), "id": a.id, "parameters": a.parameters, "architecture": a.to_dict()}
        )
        return
    console.print_line(f"{out}: {a.parameters / 1e6:.1f} M parameters, {a.layers} layers, architecture {a.id}")
    console.stderr().print(f"next: merino-edge export {out} --out BUNDLE", markup=False, soft_wrap=True)
