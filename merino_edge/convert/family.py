"""What a model family of Hugging Face is: how its configuration is read and written, and how it stores weights.

This module knows no family by name (merino_edge.convert.families has them), and touches no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from merino_edge.architecture import Architecture, Block, Ffn, Rotary
from merino_edge.convert.config import ACTIVATIONS, Config
from merino_edge.convert.folding import Folding
from merino_edge.convert.layouts import Fuse, Layout, fuse_as_is

FFN_NAME: dict[Ffn, str] = {ffn: name for name, ffn in reversed(ACTIVATIONS.items())}  # the first of each


@dataclass(frozen=True)
class Fields:
    """The family's names of an `Architecture`'s fields; empty where the family leaves no choice."""

    vocab_size: str = "vocab_size"
    tied_head: str = "tie_word_embeddings"
    max_positions: str = "max_position_embeddings"
    embedding_width: str = ""
    width: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = ""
    head_dim: str = ""
    ffn_width: str = "intermediate_size"
    norm_epsilon: str = ""
    ffn: str = ""  # by the names of ACTIVATIONS
    parallel_residual: str = ""

    def read(
        self,
        c: Config,
        *,
        tied_head: bool,
        ffn_width: int | None = None,
        kinds: Sequence[tuple[int, Rotary]] = (),
        **others: Any,
    ) -> Architecture:
        """The architecture of configuration `c`.

        `tied_head` and `ffn_width` are defaults for missing fields. `kinds` has the window and the rotary of each
        layer, where they are not the same in all. `others` are fields of the architecture.
        """
        c.only("is_causal", (True,))
        c.only("use_bidirectional_attention", (False,))
        width, heads = c.need(self.width), c.need(self.heads)
        kv_heads = c.get(self.kv_heads, heads)
        ffn_width = c.need(self.ffn_width) if ffn_width is None else c.get(self.ffn_width, ffn_width)
        block = Block(width, c.need(self.layers), heads, kv_heads, ffn_width)
        shape = {"head_dim": width // heads, "max_positions": c.need(self.max_positions), **others}
        return Architecture(
            vocab_size=c.need(self.vocab_size),
            embedding_width=c.get(self.embedding_width, width),
            blocks=by_kind(block, kinds, shape["max_positions"]) if kinds else (block,),
            tied_head=c.get(self.tied_head, tied_head),
            **shape,
        )

    def write(self, a: Architecture) -> dict[str, Any]:
        """The configuration's fields for an architecture whose blocks differ in window and rotary at most."""
        ours = {**dataclasses.asdict(a.blocks[0]), **a.to_dict(), "layers": a.layers, "ffn": FFN_NAME.get(a.ffn)}
        names = dataclasses.asdict(self)
        return {theirs: ours[name] for name, theirs in names.items() if theirs}


def by_kind(block: Block, kinds: Sequence[tuple[int, Rotary]], positions: int) -> tuple[Block, ...]:
    """One block for each run of layers with the same window and rotary. A window over all positions is none."""
    if len(kinds) != block.layers:  # a configuration of an absurd depth is refused by the architecture
        return (block,)
    shown = [(window if window < positions else 0, rotary) for window, rotary in kinds]
    return tuple(
        dataclasses.replace(block, layers=len(list(layers)), window=window, rotary=rotary)
        for (window, rotary), layers in groupby(shown)
    )


def by_convolution(block: Block, taps: int, convolves: Sequence[bool]) -> tuple[Block, ...]:
    """One block for each run of layers with a convolution of `taps`, or with the attention of `block`."""
    runs = [(kind, len(list(layers))) for kind, layers in groupby(convolves)]
    return tuple(dataclasses.replace(block, layers=count, convolution=taps if kind else 0) for kind, count in runs)


@dataclass(frozen=True)
class Family:
    """A model family. `architecture` reads a configuration, `fields` and `others` write it.

    `fuse` is the inverse of `layout.adapt`. `folding` tells what the import folds into weights. A family that is not
    `written` is only read.
    """

    model: str  # transformers' class
    architecture: Callable[[Config], Architecture]
    fields: Fields
    others: Callable[[Architecture], dict[str, Any]]
    layout: Layout
    prefixes: tuple[str, ...]  # optional prefixes of a weight's name; the first is written
    fuse: Fuse = fuse_as_is
    folding: Callable[[Config, Architecture], Folding] = lambda c, a: Folding()
    written: bool = True

    def config(self, a: Architecture) -> dict[str, Any]:
        """This family's `config.json` for an architecture of layers alike. It may not express all of it."""
        return {**self.fields.write(a), **self.others(a)}
