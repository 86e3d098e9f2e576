"""`merino-edge run MODEL`: makes a model ready and chats with it. The second time it begins at once.

It imports, exports and tunes what is not in the user's cache (merino_edge.cli.prepared_model), and then does what
`generate` does. Each step is printed as the command that a person would type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merino_edge.cli.bundle_options import Cpu, TemplateOptions, Threads
from merino_edge.runtime.sampling_parameters import Sampling

DEFAULTS = Sampling()


def run(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Name of a model, GGUF file, Hugging Face folder, checkpoint or bundle."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Answer this prompt and exit. [default: standard input, or a chat]"),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the chat.")] = None,
    precision: Annotated[str, typer.Option(help="Precision of the weights: fp32, fp16, int8 or int4.")] = "int4",
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Capacity of the KV cache, in positions. [default: 2048, at most all positions]"
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="Target of the export. [default: this board's TensorRT, else onnxruntime]")
    ] = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy decoding: always the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = DEFAULTS.temperature,
    seed: Annotated[
        int | None, typer.Option(help="Random seed. The same seed gives the same answer. [default: random]")
    ] = None,
    chat_template_kwargs: TemplateOptions = None,
    threads: Threads = None,
    cpu: Cpu = False,
    only_prepare: Annotated[
        bool, typer.Option("--only-prepare", help="Print the bundle's folder in place of a chat.")
    ] = False,
) -> None:
    """Make a model ready and chat with it.

    It fetches, imports, exports and tunes the model once, and keeps the bundle in the user's cache.
    """
    from merino_edge import limits
    from merino_edge.cli import console, prepared_model
    from merino_edge.cli.generate import generate

    if context is not None:
        limits.check_range("--context", context, 1, limits.MAX_POSITIONS)
    made = prepared_model.bundle_of(model, prepared_model.Form(precision, context, target))
    if only_prepare:
        console.print_line(str(made))
        return
    generate(
        made,
        prompt,
        system=system,
        max_tokens=max_tokens,
        greedy=greedy,
        temperature=temperature,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
        threads=threads,
        cpu=cpu,
    )
