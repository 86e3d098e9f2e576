"""What a family computes beside its weights and an architecture does not: it is folded into the weights at import.

Norms that add one to their weights, multipliers and other orders of the rotary pairs all leave an equal model of plain
weights. A tied embedding may be scaled: the final norm divides it again. `apply` folds, `undo` is its inverse for the
export. This module knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from merino_edge.architecture import Architecture, Block

# How a family pairs the channels that are rotated together: first with second half; neighbours; or halves exchanged,
# which turns the other way.
Pairs = Literal["halves", "neighbours", "exchanged"]


@dataclass(frozen=True)
class Folding:
    """The family's own rules. Each default is what an architecture does."""

    embedding: float = 1.0  # multiplies embedded tokens
    logits: float = 1.0  # multiplies logits
    residual: float = 1.0  # multiplies what attention and FFN add to the residual stream
    scores: float = 1.0  # multiplies attention scores, beside 1 / sqrt(head_dim)
    rotated: float = 1.0  # multiplies cosines and sines of the global rotary
    norm_offset: float = 0.0  # is added to every norm's weight
    pairs: Pairs = "halves"
    embedding_norm: bool = False  # embedded tokens pass an RMS norm without weights
    constants: Mapping[str, float] = field(default_factory=dict)  # weights that the family lacks, by how they end

    def constant(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The weight `name` of `shape` where the family has none such; None where it must be stored."""
        value = next((value for end, value in self.constants.items() if name.endswith(end)), None)
        return None if value is None else np.full(shape, value, np.float32)

    def apply(self, a: Architecture, name: str, array: np.ndarray) -> np.ndarray:
        """Our weight from the family's, which has our name and shape already."""
        if self == Folding():
            return array
        if name.endswith("norm.weight") and self.norm_offset:
            array = array + np.float32(self.norm_offset)
        if self.embedding_norm and name == "embedding.weight":
            array = array / np.sqrt(np.square(array).mean(axis=1, keepdims=True) + np.float32(a.norm_epsilon))
        array = self._ordered(a, name, array, undo=False)
        factor = self._factor(a, name, array)
        return array if factor is None else np.asarray(array * factor, np.float32)

    def undo(self, a: Architecture, name: str, array: np.ndarray) -> np.ndarray:
        """The family's weight from ours: the inverse of `apply`. A norm of the embedding stays as it is."""
        if self == Folding():
            return array
        factor = self._factor(a, name, array)
        array = array if factor is None else np.asarray(array / factor, array.dtype)
        array = self._ordered(a, name, array, undo=True)
        if name.endswith("norm.weight") and self.norm_offset:
            array = np.asarray(array - np.float32(self.norm_offset), array.dtype)
        return array

    def _factor(self, a: Architecture, name: str, array: np.ndarray) -> np.ndarray | np.float32 | None:
        """What multiplies the weight `name`; None: nothing."""
        of_query = "attention.query." if a.qk_norm == "none" else "attention.query_norm."
        factor = 1.0
        if name == "embedding.weight":
            factor = self.embedding
        elif name.startswith("final_norm."):
            factor = self.logits / (self.embedding if a.tied_head else 1.0)
        elif "attention.output." in name or "ffn.down." in name:
            factor = self.residual
        elif of_query in name:
            factor = self.scores
            block = a.blocks[int(name.split(".")[1])]
            if self.rotated != 1 and block.rotary == "global":
                of_head = np.ones(a.head_dim, np.float32)
                of_head[: a.rotary_dim] = self.rotated**2
                rows = np.tile(of_head * np.float32(factor), len(array) // a.head_dim)
                return rows[:, None] if array.ndim == 2 else rows
        return None if factor == 1 else np.float32(factor)

    def _ordered(self, a: Architecture, name: str, array: np.ndarray, *, undo: bool) -> np.ndarray:
        """The channels of query and key in our order of pairs; with `undo` in the family's."""
        parts = ("attention.query.", "attention.key.", "attention.query_norm.", "attention.key_norm.")
        if self.pairs == "halves" or not any(part in name for part in parts) or not a.rotary_dim:
            return array
        half, order = a.rotary_dim // 2, np.arange(a.head_dim)
        turned = order[: a.rotary_dim]
        turned[:] = turned.reshape(half, 2).T.ravel() if self.pairs == "neighbours" else np.roll(turned, half)
        order = np.argsort(order) if undo else order
        by_head = array.reshape(-1, a.head_dim, *array.shape[1:])
        return by_head[:, order].reshape(array.shape)


def layer_names(blocks: tuple[Block, ...]) -> list[str]:
    """The prefix of every stored layer's weights, in order: a layout numbers layers through all blocks."""
    return [f"blocks.{index}.layers.{layer}." for index, b in enumerate(blocks) for layer in range(b.weight_layers)]
