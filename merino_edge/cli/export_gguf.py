"""`merino-edge export --target gguf`: writes a checkpoint as one file for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merino_edge.cli import outputs


def export_gguf(checkpoint: Path, out: Path, precision: str | None, other: Mapping[str, Any], *, as_json: bool) -> None:
    """Write the checkpoint as the file `out` and say what is in it. `other` are options that mean nothing for GGUF."""
    from merino_edge.cli import console
    from merino_edge.convert.to_gguf import TYPES, export_to_gguf
    from merino_edge.errors import InputError
    from merino_edge.kind import GGUF

    for name, value in other.items():
        if value:
            raise InputError(f"{name} is for bundles, not for GGUF", "leave it out")
    if out.suffix != ".gguf":
        raise InputError(f"{out} does not end in .gguf", f"give --out {out.with_suffix('.gguf')}")
    outputs.claim(out, GGUF)
    with console.stderr().status("writing"):
        written = export_to_gguf(checkpoint, out, precision or "fp16")
    a = written.architecture
    note = console.stderr().print
    if written.copied_layers:
        note(f"note: {written.copied_layers} of {a.layers} layers are copies of another layer", markup=False)
    if written.at_fp16:
        note(f"note: {len(written.at_fp16)} matrices are float16, since 32 does not divide their inputs")
    size_mb = written.size_bytes / 1e6
    if as_json:
        document = {"out": str(out), "family": written.family, "precision": written.precision}
        console.print_json({**document, "size_mb": round(size_mb, 3), "at_fp16": list(written.at_fp16)})
        return
    stored = f"{written.precision} ({TYPES[written.precision]})"
    console.print_line(f"{out}: {written.family}, {stored}, {a.max_positions} positions, {size_mb:.1f} MB")
    note(f"next: llama-cli -m {out}", markup=False, soft_wrap=True)
