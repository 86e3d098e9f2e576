"""`merino-edge generate [BUNDLE]`: generates text from a bundle, once or as a chat in the terminal.

The text goes to stdout, statistics go to stderr. Ctrl-C ends the answer within one token and keeps its text so far.
A second Ctrl-C ends the program (exit code 130). `--json` prints `text`, `tokens`, `finish_reason`, `prompt_tokens`,
`statistics`, `sampling` (with the seed that was used) and `bundle` as one object.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli.bundle_options import (
    LAMB,
    BundleOrLamb,
    ControlTokens,
    Cpu,
    DraftPath,
    LookupFlag,
    TemplateOptions,
    Threads,
    open_bundle,
    open_proposer,
    template_options,
)
from merino_edge.errors import InputError, UnmetFormError
from merino_edge.runtime.sampling_parameters import LOOP_PENALTY, Sampling

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.runtime.chat import Chat
    from merino_edge.runtime.generation import Generation
    from merino_edge.runtime.grammar import Grammar
    from merino_edge.tokenizer import Tokenizer

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells

DEFAULTS = Sampling()


def generate(
    bundle: BundleOrLamb = LAMB,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Answer this prompt and exit. [default: standard input, or a chat]"),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            " /--no-template",
            help="Apply the chat template, or continue the raw text. [default: template if the bundle has one]",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy decoding: always the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 keeps all.")] = DEFAULTS.top_k,
    top_p: Annotated[
        float,
        typer.Option(help="Nucleus sampling: keep the fewest tokens with this total probability; 1 keeps all."),
    ] = DEFAULTS.top_p,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the highest probability.")
    ] = DEFAULTS.min_p,
    typical_p: Annotated[
        float,
        typer.Option(help="Locally typical sampling: total probability of the tokens that are kept; 1 keeps all."),
    ] = DEFAULTS.typical_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: makes every token less likely that the text already has.")
    ] = DEFAULTS.repetition_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(help="Penalty on a token for each time that the answer already has it.")
    ] = DEFAULTS.frequency_penalty,
    presence_penalty: Annotated[
        float, typer.Option(help="Penalty on each token that the answer already has.")
    ] = DEFAULTS.presence_penalty,
    loop_penalty: Annotated[
        float | None,
        typer.Option(
            help="Penalty on a token that goes on with a repeated sequence of the answer; 0 is none. "
            f"[default: {LOOP_PENALTY:g}, but 0 if the answer is greedy or another penalty is given]",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed. The same seed gives the same answer. [default: random]")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SCHEMA", help="Constrain answers to JSON of this schema: a file, or the schema itself."
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Constrain answers to this regular expression.")
    ] = None,
    lookup: LookupFlag = False,
    draft: DraftPath = None,
    slide: Annotated[
        bool,
        typer.Option(
            "--slide",
            "--truncate-history",
            help="Drop the oldest turns of a chat that no longer fits the context, instead of refusing.",
        ),
    ] = False,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="KV cache of the prompt: read from this file if it exists, else written."),
    ] = None,
    control_tokens: ControlTokens = False,
    chat_template_kwargs: TemplateOptions = None,
    threads: Threads = None,
    cpu: Cpu = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the statistics in four lines.")] = False,
) -> None:
    """Generate text, or chat in the terminal.

    With --prompt, or with text on standard input, it answers once. Else it opens a chat.
    """
    from merino_edge.cli.terminal import Terminal, banner, cut_note, print_statistics, run_turn
    from merino_edge.runtime.chat import Chat

    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    filters = (temperature, top_k, top_p, min_p, typical_p)
    sampling = Sampling(*filters, *penalties, loop_penalty=loop_penalty, seed=seed, greedy=greedy)
    options = template_options(chat_template_kwargs)
    if json_schema is not None and regex is not None:
        raise InputError("--json-schema and --regex exclude each other", "give one")
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_stdin()
    if prompt is None and as_json:
        raise InputError("--json needs a prompt", "give --prompt TEXT or pipe one in")
    with suppress(AttributeError):  # only a real file needs this and can do it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    began = perf_counter()
    engine, tokenizer, opened = open_bundle(bundle, threads, cpu=cpu)
    with ExitStack() as stack:
        stack.enter_context(closing(engine))
        if proposer := open_proposer(engine, opened, lookup=lookup, draft=draft, threads=threads, cpu=cpu):
            stack.enter_context(closing(proposer))
        grammar = _grammar(tokenizer, engine.vocab_size, json_schema, regex)
        if grammar is not None and grammar.notes:
            from merino_edge.cli.console import stderr

            for unheld in grammar.notes:
                stderr().print(f"note: {unheld}", highlight=False, markup=False, soft_wrap=True)
        raw = None if chat is None else not chat
        talk = Chat(
            engine,
            tokenizer,
            sampling,
            max_tokens,
            stop=stop or (),
            system=system,
            raw=raw,
            grammar=grammar,
            proposer=proposer,
            truncate_history=slide,
            control_tokens=control_tokens,
            template_options=options,
        )
        if talk.drops_system:
            from merino_edge.cli.console import stderr

            stderr().print("note: the chat template of this model leaves the system message out", highlight=False)
        cache_to_write = _read_cache(prompt_cache, talk, opened)
        load_ms = (perf_counter() - began) * 1e3
        if prompt is None:
            Terminal(talk, load_ms, verbose=verbose).run(banner(opened))
            _write_cache(cache_to_write, talk, opened)
            return
        answer = run_turn(talk, prompt, quiet=as_json)
        if as_json:
            from merino_edge.cli.console import print_json

            print_json(_document(talk, answer, load_ms) | {"bundle": opened.card()})
        else:
            print_statistics(answer.statistics, load_ms, verbose=verbose)
        _write_cache(cache_to_write, talk, opened)
    if answer.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)
    note = cut_note(answer, talk)
    if not answer.meets_form:
        raise UnmetFormError(f"the answer ends before it has its form ({answer.finish_reason})", note[1])
    if note[0]:
        from merino_edge.cli.console import stderr

        stderr().print(f"note: {note[0]}; {note[1]}", highlight=False, soft_wrap=True)


def _read_cache(path: Path | None, talk: Chat, opened: Bundle) -> Path | None:
    """Load the prompt cache at `path`. Returns `path` if there is none yet: then the last prompt is saved there."""
    if path is None or not path.exists():
        return path
    from merino_edge.runtime import prompt_cache

    prompt_cache.load(path, talk.session, opened)
    return None


def _write_cache(path: Path | None, talk: Chat, opened: Bundle) -> None:
    prompt_tokens = talk.turn.statistics.prompt_tokens if talk.turn else 0
    positions = min(prompt_tokens, len(talk.session.ids))
    if path is not None and positions:
        from merino_edge.cli.console import stderr
        from merino_edge.runtime import prompt_cache

        if prompt_cache.is_held(talk.session, positions):
            prompt_cache.save(path, talk.session, positions, opened)
        else:
            note = f"note: {prompt_cache.LEFT_BEHIND}: {prompt_cache.AGAIN_SHORTER}"
            stderr().print(note, highlight=False, soft_wrap=True)


def _grammar(tokenizer: Tokenizer, vocab_size: int, json_schema: str | None, regex: str | None) -> Grammar | None:
    if json_schema is None and regex is None:
        return None
    from merino_edge import artefact
    from merino_edge.runtime.grammar import Grammars

    grammars = Grammars(tokenizer, vocab_size)
    if regex is not None:
        return grammars.regex(regex)
    assert json_schema is not None
    is_schema = json_schema.lstrip().startswith("{")
    return grammars.json_schema(json_schema if is_schema else artefact.read_text(Path(json_schema)))


def _read_stdin() -> str:
    from merino_edge import limits

    data = sys.stdin.buffer.read(limits.MAX_PROMPT_BYTES + 1)
    if len(data) > limits.MAX_PROMPT_BYTES:
        raise InputError(f"stdin has more than {limits.MAX_PROMPT_BYTES} bytes", "shorten it (merino_edge/limits.py)")
    try:
        return data.decode().removesuffix("\n")  # echo and editors end the text with it
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 (byte {error.start})", "convert it, for example with iconv") from None


def _document(talk: Chat, answer: Generation, load_ms: float) -> dict[str, Any]:
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.statistics.prompt_tokens,
        "statistics": {"load_ms": round(load_ms, 3), **answer.statistics.to_dict()},
        "sampling": dataclasses.asdict(talk.sampling) | {"seed": answer.seed},
    }
