"""`merino-edge distill logits TEACHER --corpus CORPUS --out LOGITS`: stores a teacher's top-k log-probabilities."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from merino_edge.cli import outputs


def distill_logits(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Checkpoint folder of the teacher.")],
    corpus: Annotated[
        Path,
        typer.Option(metavar="CORPUS", help="Corpus folder, made by merino-edge tokenize --tokenizer TEACHER."),
    ],
    out: Annotated[Path, typer.Option(metavar="LOGITS", help="Folder to write.")],
    top_k: Annotated[int, typer.Option(help="Highest log-probabilities to keep for each token.")] = 64,
    window: Annotated[
        int | None, typer.Option(help="Window length in tokens. [default: all positions of the teacher]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next. [default: half a window]")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Windows at a time.")] = 8,
    precision: Annotated[
        str, typer.Option(help="Precision of the computation: auto (bf16 where the hardware has it), fp32 or bf16.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")] = None,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help=outputs.SAME_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the header as one JSON object.")] = False,
) -> None:
    """Store a teacher's top-k logits over a corpus.

    train --teacher LOGITS then needs no teacher in memory. A run that was stopped or killed continues with the same
    command.
    """
    from merino_edge.cli import console
    from merino_edge.errors import Interrupted, require_all

    require_all({"train": ["torch", "safetensors"]})
    from merino_edge import checkpoint
    from merino_edge.data.corpus import load
    from merino_edge.distillation import teacher_logits
    from merino_edge.training import device as computing

    outputs.claim(out, teacher_logits.KIND, resumes=True)
    computing.set_threads(threads)
    source, loaded_corpus = checkpoint.load(teacher), load(corpus)
    device = computing.device()
    bf16 = computing.uses_bf16(precision, device)
    began = time.perf_counter()
    with console.progress(console.stderr()) as bar:
        task = bar.add_task("logits", total=len(loaded_corpus.tokens), note="")

        def on_tokens(done: int, now: int) -> None:
            bar.update(task, completed=done, note=f"{now / (time.perf_counter() - began):,.0f} tokens/s")

        try:
            header = teacher_logits.write_teacher_logits(
                source,
                loaded_corpus,
                out,
                top_k=top_k,
                window=window,
                stride=stride,
                batch=batch,
                bf16=bf16,
                device=device,
                on_tokens=on_tokens,
            )
        except KeyboardInterrupt:
            raise Interrupted("interrupted", "the same command goes on") from None
    size_mb = sum(path.stat().st_size for path in out.glob("*.bin")) / 1e6
    line = f"{header['tokens']:,} tokens, {header['top_k']} log-probabilities each, {size_mb:,.1f} MB"
    console.stderr().print(line, soft_wrap=True)
    if as_json:
        console.print_json(header)
    else:
        console.print_line(f"{out}: next, merino-edge train A.json --corpus {corpus} --teacher {out} --out CHECKPOINT")
