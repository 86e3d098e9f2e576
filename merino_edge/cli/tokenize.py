"""`merino-edge tokenize SOURCES... --out CORPUS`: tokenizes text and conversations once, for many training runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from merino_edge.cli import outputs


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text or .jsonl files, .xz of them, folders of them, or hf:NAME[:SPLIT[:COLUMN]].",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Corpus folder to write.")],
    vocab: Annotated[
        int | None, typer.Option(help="Train a tokenizer with this vocabulary size on the sources.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Use the tokenizer of this checkpoint or bundle.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=outputs.FORCE_HELP)] = False,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help=outputs.CONTINUE_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Tokenize a corpus once, for many training runs.

    The corpus folder is an argument of train --corpus. A folder that was made from the same sources is kept as it is.

    A line of a .jsonl file is a text, {"text": ...}, or a conversation. Of a conversation only the assistant's words
    are learned. Its forms are {"messages": [{"role": ..., "content": ...}, ...]}, {"turns": [...]} and
    {"instruction": ..., "response": ...}.
    """
    from merino_edge import limits, output
    from merino_edge.cli import console
    from merino_edge.data import corpus_writer
    from merino_edge.data.corpus import fingerprint, prepare
    from merino_edge.errors import InputError
    from merino_edge.tokenizer import Tokenizer

    loaded = None if tokenizer is None else Tokenizer.load(tokenizer)
    if (vocab is None) == (loaded is None):
        raise InputError("a corpus needs one tokenizer", "add: --vocab N, or --tokenizer CHECKPOINT")
    if loaded is not None:
        vocab = corpus_writer.required_vocab_size(loaded.backend)
    assert vocab is not None
    limits.check_range("vocab", vocab, 1, limits.MAX_VOCAB_SIZE)
    began = time.perf_counter()
    with output.claim(out, corpus_writer.KIND, resumes=True), console.progress(console.stderr()) as bar:
        task = bar.add_task("tokenize", total=None, note="reading")
        corpus = prepare(
            sources,
            vocab,
            out,
            loaded,
            on_tokens=lambda count: bar.update(task, note=f"{count:,} tokens"),
            replaces=force,
            resume=resume,
        )
    header, seconds = corpus.header, time.perf_counter() - began
    if as_json:
        counts = ("tokens", "learned_tokens", "conversations", "unanswered", "tokenizer_tokens", "vocab_size")
        figures = {name: header[name] for name in counts}
        sha256 = fingerprint([corpus.folder])  # the same as in the record of a training on the folder
        console.print_json({"corpus": str(corpus.folder), **figures, "sha256": sha256, "seconds": seconds})
        return
    what = f"{header['tokens']:,} tokens (vocabulary {header['tokenizer_tokens']:,}) in {seconds:.1f} s"
    if header["conversations"]:
        what += f", {header['learned_tokens']:,} learned, of {header['conversations']:,} conversations"
    if header["unanswered"]:
        what += f"; {header['unanswered']:,} without an answer left out"
    console.stderr().print(what, soft_wrap=True)
    console.print_line(f"{corpus.folder}: next, merino-edge train A.json --corpus {corpus.folder} --out CHECKPOINT")
