"""`merino-edge distill generate TEACHER --prompts FILE --out CORPUS.jsonl`: a teacher generates a training corpus."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from merino_edge.cli import outputs


def distill_generate(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Checkpoint folder of the teacher.")],
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="Prompts: .json of templates, .txt with one prompt a line, or children (included in the package).",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="CORPUS.jsonl", help="File to write. CORPUS.json beside it records how it was made."),
    ],
    count: Annotated[
        int | None,
        typer.Option(help="Prompts to answer. Fewer answers are kept. [default: the lines of a .txt, else 1000]"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer. A longer answer is dropped.")] = 300,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 keeps all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: keep the fewest tokens with this total probability; 1 keeps all.")
    ] = 0.95,
    frequency_penalty: Annotated[
        float, typer.Option(help="Penalty on a token for each time that the answer already has it.")
    ] = 0.0,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Most answers generated at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Random seed of prompts and answers.")] = 0,
    licence: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Note on the teacher's licence, kept in CORPUS.json.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the prompts instead of answering them.")] = False,
    precision: Annotated[
        str, typer.Option(help="Precision of the computation: auto (bf16 where the hardware has it), fp32 or bf16.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")] = None,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help=outputs.SAME_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print CORPUS.json.")] = False,
) -> None:
    """Let a teacher generate a synthetic training corpus.

    A smaller model then learns from the teacher's answers (sequence-level distillation). A run that was stopped or
    killed continues with the same command, and ends with the same bytes.
    """
    from merino_edge import output
    from merino_edge.cli import console
    from merino_edge.errors import Interrupted, require_all

    require_all({"train": ["torch", "safetensors"]})
    from merino_edge import checkpoint
    from merino_edge.distillation import prompts as prompt_files
    from merino_edge.distillation import synthetic_corpus
    from merino_edge.pytorch.batched_generation import SamplingParams
    from merino_edge.training import device as computing

    outputs.hold(output.lock(out))
    computing.set_threads(threads)
    prompt_set = prompt_files.load(prompts)
    plan = synthetic_corpus.Plan(
        len(prompt_set.lines) or 1000 if count is None else count,
        max_tokens,
        SamplingParams(temperature, top_k, top_p, frequency_penalty),
        batch,
        seed,
        plain,
    )
    device = computing.device()
    bf16 = computing.uses_bf16(precision, device)
    began, computed = time.perf_counter(), 0
    err = console.stderr()
    with console.progress(err) as bar:
        task = bar.add_task("generate", total=plan.count, note="opening")

        def on_batch(header: dict[str, Any], so_far: int) -> None:
            nonlocal computed
            computed = so_far
            speed = computed / (time.perf_counter() - began)
            bar.update(task, completed=header["samples"], note=f"{header['kept']:,} kept, {speed:,.0f} tokens/s")

        try:
            header = synthetic_corpus.write(
                checkpoint.load(teacher),
                prompt_set,
                out,
                plan,
                bf16=bf16,
                device=device,
                licence=licence,
                on_batch=on_batch,
            )
        except KeyboardInterrupt:
            raise Interrupted("interrupted", "the same command goes on") from None
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in sorted(header["dropped"].items())) or "none"
    speed = computed / (time.perf_counter() - began)
    line = f"{header['kept']:,} of {header['samples']:,} answers kept, {header['tokens']:,} tokens; dropped: {dropped}"
    err.print(f"{line}; {speed:,.0f} tokens/s" if computed else line, soft_wrap=True)
    if as_json:
        console.print_json(header)
    else:
        console.print_line(f"{out}: next, merino-edge tokenize {out} --vocab 4096 --out CORPUS")
