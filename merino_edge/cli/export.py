"""`merino-edge export`: exports a checkpoint as a bundle, which is compared with PyTorch before it is written."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merino_edge.cli import outputs, units

if TYPE_CHECKING:
    from merino_edge.architecture import Architecture
    from merino_edge.runtime.engines.onnx_engine import OnnxEngine


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, from train or import.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write, or a .gguf file.")],
    precision: Annotated[
        str | None, typer.Option(help="Precision of the weights: fp32, fp16, int8 or int4. [default: fp32]")
    ] = None,
    bits_of: Annotated[
        Path | None,
        typer.Option(
            metavar="RESULT",
            help="Give every block the precision that this search result has for it. "
            "Everything else gets the precision of the search.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Capacity of the KV cache, in positions. For TensorRT give several, such as 256,512,1024: "
            "a step costs what its cache can hold, and the smallest cache that suffices runs. "
            "[default: 1024, at most all positions]",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Where it will run: onnxruntime, a board's TensorRT (merino-edge targets lists them), or gguf, "
            "which writes one file for llama.cpp."
        ),
    ] = "onnxruntime",
    lowering: Annotated[
        str, typer.Option(help="Lowering of the graph: native, primitive or ort. [default: the target's]")
    ] = "",
    fast: Annotated[
        bool,
        typer.Option("--fast", help="int4 for ONNX Runtime in a form that takes a quarter less time, at more error."),
    ] = False,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="Rounding at int4: nearest, or gptq, which calibrates on text that the model generates and takes "
            "about a minute more. [default: nearest, with --fast gptq]"
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="Block size at int4 and int8: 32, 64 or 128 inputs share a scale. [default: 32, with --fast 64]"
        ),
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            help="KV cache: float or int8. int8 needs a quarter of the memory. It makes long answers faster but "
            "prompts slower. It needs int8 or int4 weights and ONNX Runtime 1.27."
        ),
    ] = "float",
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="At int4: largest mean KL divergence from PyTorch. As few matrices as possible are upgraded to int8.",
        ),
    ] = None,
    max_mb: Annotated[
        float | None,
        typer.Option(
            parser=units.megabytes("--max-mb"),
            metavar="MB",
            help="At int4: largest size of the bundle. As many matrices as fit are upgraded to int8.",
        ),
    ] = None,
    keep_vocab: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Vocabulary pruning: the LM head keeps only the bytes and the tokens of this text "
            "(a file, .xz or a folder).",
        ),
    ] = None,
    genai: Annotated[
        bool, typer.Option("--genai", help="Also write genai_config.json, so that onnxruntime-genai runs the bundle.")
    ] = False,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help=outputs.CONTINUE_HELP)] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads for the comparison with PyTorch. [default: all cores]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Export a checkpoint to ONNX and compare it with PyTorch.

    The bundle is written only if its graph computes what PyTorch computes, within the limits of the precision.
    """
    from merino_edge import __version__, bundle, limits, names
    from merino_edge import checkpoint as checkpoints
    from merino_edge.cli.console import check_line, print_json, print_line, stderr
    from merino_edge.errors import InputError, ParityError, require_all

    if target == "gguf":
        from merino_edge.cli.export_gguf import export_gguf

        other: dict[str, object] = {
            "--bits-of": bits_of,
            "--context": context,
            "--lowering": lowering,
            "--fast": fast,
            "--block": block,
            "--genai": genai,
        }
        other |= {"--rounding": rounding, "--max-kl": max_kl, "--max-mb": max_mb, "--keep-vocab": keep_vocab}
        other |= {"--cache": cache != "float", "--continue": resume, "--threads": threads}
        export_gguf(checkpoint, out, precision, other, as_json=json)
        return
    require_all({"export": ["onnx", "onnx_ir", "safetensors"], "train": ["torch"]})
    from merino_edge.export import fitting
    from merino_edge.export.bundle_writer import write_bundle
    from merino_edge.export.prepare_weights import ExportOptions
    from merino_edge.export.targets import Target
    from merino_edge.unfinished import Unfinished

    outputs.claim(out, bundle.KIND)
    searched, found, own = _found_precisions(bits_of) if bits_of is not None else (None, None, ())
    precision = found or "fp32" if precision is None else precision
    if found is not None and found != precision:
        raise InputError(f"{bits_of} was searched with --precision {found}, not {precision}", "leave --precision out")
    block = (64 if fast else 32) if block is None else block
    rounding = ("gptq" if fast else "nearest") if rounding is None else rounding
    usual = Target.named(
        target, precision, lowering, block=block, fast=fast, cache=cache, block_precisions=own
    )  # refuse before minutes of work
    if rounding not in ("gptq", "nearest"):
        raise InputError(f"unknown rounding {rounding!r}", names.choose(rounding, ("gptq", "nearest")))
    for name, value in (("--max-kl", max_kl), ("--max-mb", max_mb)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}", "give a positive number")
        if value is not None and precision != "int4":
            message = f"{name} upgrades int4 matrices to int8, the precision is {precision}"
            raise InputError(message, "use --precision int4")
        if value is not None and fast:
            raise InputError(
                f"{name} makes the bundle slower and more accurate, --fast the opposite", "leave out one of them"
            )
    contexts = None if context is None else _contexts(context)
    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    console = stderr()
    with console.status("reading the checkpoint") as status:
        source = checkpoints.load(checkpoint)
        a = source.architecture
        if searched is not None and searched.blocks != a.blocks:
            raise InputError(
                f"{bits_of} holds architecture {searched.id}, the checkpoint has other blocks", "train what was found"
            )
        *smaller, positions = contexts or [min(1024, a.max_positions)]
        resolved = usual if lowering else fitting.fitted(usual, a, positions)
        fitting.require_fit(resolved, a)
        for line in fitting.notes(resolved, a, usual, positions):
            console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)
        engine = partial(_open_engine, a, threads)
        try:
            max_bytes = None if max_mb is None else round(1e6 * max_mb)
            options = ExportOptions(
                resolved,
                positions,
                smaller_contexts=smaller,
                rounding=rounding,
                max_kl=max_kl,
                max_bytes=max_bytes,
                keep_vocab=keep_vocab,
                genai=genai,
            )
            calibrated = {"checkpoint": source.training["sha256"], "precisions": resolved.all_precisions}
            key = {**calibrated, "cache": cache, "rounding": rounding, "tool": __version__}
            with Unfinished(out, key, resume=resume) as unfinished:
                written = write_bundle(source, out, options, engine, status.update, unfinished=unfinished)
        except ParityError as error:
            for check in error.checks:
                console.print(check_line(check), highlight=False)
            raise
    manifest = written.manifest
    size_mb = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    if json:
        keys = (
            "id",
            "precision",
            "block_precisions",
            "target",
            "contexts",
            "raised_to_int8",
            "vocabulary",
            "parity",
            "compiled",
        )
        print_json({"out": str(out), "size_mb": round(size_mb, 1), **{key: manifest[key] for key in keys}})
        return
    for check in manifest["parity"]:
        print_line(check_line(check))
    if compiled := manifest["compiled"]:
        how = f"compiles {compiled['lowering']} for {compiled['capability']} in {compiled['seconds']:.1f} s"
        print_line(f"✓ {'TensorRT for RTX':<20} {how}")
    if vocabulary := manifest["vocabulary"]:
        saved_ms = vocabulary["whole_decode_ms"] - vocabulary["decode_ms"]
        print_line(
            f"head: {vocabulary['kept']} of {vocabulary['of']} tokens, which saves {saved_ms:.2f} of "
            f"{vocabulary['whole_decode_ms']:.2f} ms a token here"
        )
    mixed = f" with {count} matrices at int8" if (count := len(manifest["raised_to_int8"])) else ""
    capacities = ", ".join(map(str, written.contexts))
    blocks = f" with blocks of {', '.join(own)}" if own else ""
    print_line(f"{out}: {precision}{mixed}{blocks}, {capacities} positions, {size_mb:.1f} MB")
    if target.startswith("onnxruntime"):
        console.print(f"next: merino-edge generate {out}", style="dim", soft_wrap=True)


def _found_precisions(result: Path) -> tuple[Architecture, str, tuple[str, ...]]:
    """What a search found, its precision, and those of the blocks. Raises InputError where it found none for them."""
    from merino_edge import architecture
    from merino_edge.errors import InputError

    a, document = architecture.load(result)
    choices = document.get("choices")
    own = choices.get("precisions") if isinstance(choices, dict) else None
    if not isinstance(own, list) or not all(isinstance(name, str) for name in [document.get("precision"), *own]):
        raise InputError(f"{result} says no precisions of blocks", "find them: merino-edge search --bits int4,int8")
    return a, document["precision"], tuple(own)


def _contexts(text: str) -> list[int]:
    """256,512,1024 -> [256, 512, 1024]"""
    from merino_edge.errors import InputError

    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise InputError(f"--context is {text[:40]!r}", "give a number of positions, or several as 256,512,1024")
    return sorted(set(map(int, text.split(","))))


def _open_engine(a: Architecture, threads: int | None, graph: Path, context: int) -> OnnxEngine:
    from merino_edge.runtime.engines.onnx_engine import OnnxEngine

    return OnnxEngine(graph, a, context, threads)
