"""An architecture's costs in closed form: parameters, FLOPs, and bytes of weights, KV cache and activations.

Every count is a sum of parts. Each part is a function of its own, so a search can add up the same numbers block by
block: `total = ends + sum(blocks) + sum(width projections between blocks)`. The ends are embedding, positions, final
norm and head.

FLOPs follow the paper (section 6): batch 1, two per multiply-add, attention over the full square. Norms, softmax and
biases do not count, nor does the output head. The projections of embedding and head count with the head. This gives
the published 213 G for OPT-125M and 721 G for OPT-350M.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from merino_edge import cache_rings, storage
from merino_edge.storage import (
    NORM_BYTES,
    POSITION_INDEX_BYTES,
    STATE_BYTES,
    TAP_BYTES,
    WINDOW_SLACK,
    Storage,
    rules_of,
    stored_as,
)

if TYPE_CHECKING:  # an architecture counts itself by these functions
    from merino_edge.architecture import Architecture, Block

INT4_BLOCK, PRECISIONS, SCALE_BYTES = storage.INT4_BLOCK, storage.PRECISIONS, storage.SCALE_BYTES

# --- parameters ------------------------------------------------------------------------------------


def _norm_parameters(a: Architecture, width: int) -> int:
    return width * (2 if a.norm == "layernorm" else 1)


def layer_matrix_parameters(a: Architecture, block: Block) -> int:
    """Elements of one layer's weight matrices: its multiply-adds per token without attention and taps."""
    mixer = 4 * block.width if block.convolution else 2 * (block.heads + block.kv_heads) * a.head_dim
    ffn_matrices = 3 if a.gated else 2
    return mixer * block.width + ffn_matrices * block.width * block.ffn_width


def tap_parameters(block: Block) -> int:
    """Elements of the taps of one layer's convolution, also its multiply-adds per token; 0 with attention."""
    return block.width * block.convolution


def layer_norm_parameters(a: Architecture, block: Block) -> int:
    """Elements of one layer's norms."""
    total = (4 if a.norm_placement == "both" else 2) * _norm_parameters(a, block.width)
    if block.convolution:
        return total
    of_heads = {"none": 0, "head": 2, "width": block.heads + block.kv_heads}[a.qk_norm]
    return total + of_heads * a.head_dim


def layer_vector_parameters(a: Architecture, block: Block) -> int:
    """Elements of one layer's norms and biases."""
    total = layer_norm_parameters(a, block)
    if block.convolution:
        total += 5 * block.width if a.convolution_bias else 0
        return total + (block.width + (2 if a.gated else 1) * block.ffn_width if a.bias == "all" else 0)
    if a.bias != "none":
        total += (block.heads + 2 * block.kv_heads) * a.head_dim
    if a.bias == "all":
        total += 2 * block.width + (2 if a.gated else 1) * block.ffn_width
    return total


def block_parameters(a: Architecture, block: Block) -> int:
    """Stored parameters of a block. Shared layers count once."""
    layer = layer_matrix_parameters(a, block) + tap_parameters(block) + layer_vector_parameters(a, block)
    return block.weight_layers * layer


def width_projection_parameters(before: int, after: int) -> int:
    """Elements of the projection between two widths; 0 where they are equal."""
    return before * after if before != after else 0


def _inner_projection_parameters(a: Architecture) -> int:
    return sum(width_projection_parameters(x.width, y.width) for x, y in pairwise(a.blocks))


def end_parameters(a: Architecture) -> int:
    """Parameters of embedding, positions, final norm and head, with the projections at either end."""
    first, last = a.blocks[0].width, a.blocks[-1].width
    table = a.vocab_size * a.embedding_width
    total = table * (1 if a.tied_head else 2) + a.position_rows * first
    total += width_projection_parameters(a.embedding_width, first) + width_projection_parameters(
        last, a.embedding_width
    )
    return total + (_norm_parameters(a, last) if a.final_norm else 0)


def parameters(a: Architecture) -> int:
    """Stored parameters. Shared layers and a tied head count once."""
    return end_parameters(a) + _inner_projection_parameters(a) + sum(block_parameters(a, block) for block in a.blocks)


# --- FLOPs -----------------------------------------------------------------------------------------


def layer_flops(a: Architecture, block: Block, sequence: int) -> int:
    """FLOPs of one layer over `sequence` tokens."""
    mixing = 2 * sequence * tap_parameters(block)
    if not block.convolution:
        mixing = 4 * sequence * sequence * block.heads * a.head_dim
    return 2 * sequence * layer_matrix_parameters(a, block) + mixing


def block_flops(a: Architecture, block: Block, sequence: int) -> int:
    """FLOPs of a block over `sequence` tokens. Shared layers are computed, so all layers count."""
    return block.layers * layer_flops(a, block, sequence)


def head_flops(a: Architecture, sequence: int) -> int:
    """FLOPs of the output head over every position, with the width projections at either end."""
    first, last, width = a.blocks[0].width, a.blocks[-1].width, a.embedding_width
    ends = width_projection_parameters(width, first) + width_projection_parameters(last, width)
    return 2 * sequence * (a.vocab_size * width + ends)


def flops(a: Architecture, sequence: int = 1024, *, head: bool = False) -> int:
    """FLOPs of one forward pass over `sequence` tokens, batch 1 (paper section 6)."""
    total = sum(block_flops(a, block, sequence) for block in a.blocks) + 2 * sequence * _inner_projection_parameters(a)
    return total + (head_flops(a, sequence) if head else 0)


# --- bytes -----------------------------------------------------------------------------------------

# `target` is the name of a target of export. Without one, weights are counted as for `onnxruntime`, without its tables
# of rotary angles, and the cache as a GPU's. `merino_edge.storage` says how each target stores what.
MATRIX_BYTES = {precision: stored_as(precision).matrix.bytes(1, 1) for precision in PRECISIONS}  # without a target


def check_precision(precision: str) -> None:
    """Raise InputError for an unknown precision."""
    stored_as(precision)


def block_weight_bytes(a: Architecture, block: Block, precision: str, target: str | None = None) -> float:
    """Bytes of a block's stored weights. Shared layers count once."""
    form, width, query_width = stored_as(precision, target), block.width, block.heads * a.head_dim
    matrix = form.matrix.bytes
    if block.convolution:
        total = matrix(3 * width, width) + matrix(width, width)
    else:
        total = matrix(query_width + 2 * block.kv_heads * a.head_dim, width) + matrix(width, query_width)
    total += matrix((2 if a.gated else 1) * block.ffn_width, width) + matrix(width, block.ffn_width)
    norms = layer_norm_parameters(a, block)
    biases = layer_vector_parameters(a, block) - norms
    if block.convolution:  # the taps stay float32, as do their biases
        of_taps = width if a.convolution_bias else 0
        total += (tap_parameters(block) + of_taps) * TAP_BYTES
        biases -= of_taps
    return block.weight_layers * (total + norms * NORM_BYTES + biases * form.bias_bytes)


def width_projection_bytes(before: int, after: int, precision: str, target: str | None = None) -> float:
    """Bytes of the projection between two widths; 0 where they are equal."""
    return stored_as(precision, target).matrix.bytes(after, before) if before != after else 0.0


def table_bytes(a: Architecture, precision: str) -> int:
    """Bytes of the embedding table, or of a head of its own, where no target is named."""
    return int(stored_as(precision).head.bytes(a.vocab_size, a.embedding_width))


def end_weight_bytes(a: Architecture, precision: str, target: str | None = None) -> float:
    """Bytes of embedding, positions, final norm and head, with the projections at either end.

    With a target, what its graphs hold for each position of the cache counts too.
    """
    form, first, last, width = stored_as(precision, target), a.blocks[0].width, a.blocks[-1].width, a.embedding_width
    total = form.embedding.bytes(a.vocab_size, width) + form.positions.bytes(a.position_rows, first)
    if form.splits_table or not a.tied_head:
        total += form.head.bytes(a.vocab_size, width)
    for before, after in ((width, first), (last, width)):
        total += width_projection_bytes(before, after, precision, target)
    total += _position_bytes(a, form, rings=False)
    return total + (_norm_parameters(a, last) * NORM_BYTES if a.final_norm else 0)


def _position_bytes(a: Architecture, form: Storage, *, rings: bool) -> int:
    """Bytes of what graphs hold for the positions of the cache: numbers, and the cosines and sines of angles.

    Without `rings` as if no layer had a window, which is a sum over the parts of a model; a search counts so.
    """
    positions, lengths = a.max_positions, cache_rings.lengths(a, a.max_positions) if rings else []
    worth = bool(lengths) and cache_rings.are_worth(a, positions)
    lowerings = form.lowerings(a.head_dim, a.rotary_dim, rings_worth=worth)
    total = positions * form.angle_bytes(a.head_dim, a.rotary_dim, lowerings) * len(a.rotaries)
    numbered = 0
    if "primitive" in lowerings and rules_of(form.target).tensorrt:  # each row of a ring, and where a position stands
        numbered = sum(length + positions for length in lengths)
    wrap = all(b.convolution or cache_rings.ring_positions(b.window, positions) < positions for b in a.blocks)
    if "native" in lowerings or ("primitive" in lowerings and not (numbered and wrap)):
        numbered += positions
    return total + numbered * POSITION_INDEX_BYTES


def weight_bytes(
    a: Architecture, precision: str = "fp16", target: str | None = None, block_precisions: Sequence[str] = ()
) -> int:
    """Bytes of the stored weights, rounded. The layers of each block may have a precision of their own.

    What graphs with rings hold beside them counts too, which a search leaves out. Raises InputError for an unknown
    precision, UnsupportedError for one that the target cannot run.
    """
    total = end_weight_bytes(a, precision, target)
    total += sum(width_projection_bytes(x.width, y.width, precision, target) for x, y in pairwise(a.blocks))
    form = stored_as(precision, target)
    total += _position_bytes(a, form, rings=True) - _position_bytes(a, form, rings=False)
    precisions = block_precisions or [precision] * len(a.blocks)
    return round(
        total + sum(block_weight_bytes(a, block, own, target) for block, own in zip(a.blocks, precisions, strict=True))
    )


def kv_bytes(a: Architecture, positions: int | None = None, element_bytes: int = 2, *, rings: bool = False) -> int:
    """Bytes of the KV cache for `positions` (default: all) positions, and of the states of convolutions.

    `rings`: whether layers with a window keep rings only (merino_edge.cache_rings).
    """
    length = a.max_positions if positions is None else positions
    return sum(block_kv_bytes(a, block, length, element_bytes, rings=rings) for block in a.blocks)


# --- memory while it runs --------------------------------------------------------------------------

ACTIVATION_BYTES = 4  # activations are float32; a backend with half the size needs less


def cache_element_bytes(precision: str, target: str | None = None) -> int:
    """Bytes per element of the KV cache. ONNX Runtime's CPU engine keeps float32 at every precision."""
    return stored_as(precision, target).cache_bytes


def block_kv_bytes(
    a: Architecture, block: Block, positions: int, element_bytes: int = 2, *, rings: bool = False
) -> int:
    """Bytes of a block's KV cache for `positions` positions; of convolutions, their states at any position.

    `rings`: whether layers with a window keep rings only.
    """
    if block.convolution:
        return block.layers * (block.convolution - 1) * block.width * STATE_BYTES
    if rings:
        positions = cache_rings.ring_positions(block.window, positions)
    return 2 * block.layers * block.kv_heads * a.head_dim * positions * element_bytes


def kept_positions(block: Block, positions: int, target: str | None = None) -> int:
    """How many of `positions` the cache of a block keeps in a bundle for `target`; all where windows are masked."""
    windowed = block.window and rules_of(target).keeps_windows
    return min(positions, block.window + WINDOW_SLACK) if windowed else positions


def block_step_bytes(a: Architecture, block: Block, precision: str, positions: int) -> float:
    """Bytes that a decode step reads for a block: every weight once, and `positions` cache positions, or its window."""
    seen = min(positions, block.window or positions)
    cache = block_kv_bytes(a, block, seen, cache_element_bytes(precision))
    return block_weight_bytes(a, block, precision) + cache


def step_bytes(a: Architecture, precision: str, positions: int) -> float:
    """Bytes that a decode step of the whole model reads. From the embedding table it reads one row."""
    blocks = sum(block_step_bytes(a, block, precision, positions) for block in a.blocks)
    projections = _inner_projection_parameters(a)
    projections += sum(
        width_projection_parameters(a.embedding_width, width)
        for width in (a.blocks[0].width, a.blocks[-1].width)
        if width != a.embedding_width
    )
    return table_bytes(a, precision) + projections * MATRIX_BYTES[precision] + blocks


def layer_activation_bytes(a: Architecture, block: Block, tokens: int) -> int:
    """Peak activation bytes while one layer of `block` runs `tokens` tokens over a full cache.

    Attention holds the residual stream, Q, K and V before and after the split into heads, the scores and the result.
    The FFN holds the residual stream, its norm and the hidden activations. A gated FFN holds gate, up and product.
    """
    packed = (block.heads + 2 * block.kv_heads) * a.head_dim
    attention = 2 * block.width + 2 * packed + block.heads * a.max_positions
    if block.convolution:  # the residual stream, its norm, three inputs, the gated one and the sum over the taps
        attention = 7 * block.width
    ffn = 2 * block.width + (3 if a.gated else 1) * block.ffn_width
    return tokens * max(attention, ffn) * ACTIVATION_BYTES


def end_activation_bytes(a: Architecture, tokens: int) -> int:
    """Peak activation bytes outside the layers: the embedded tokens, or the logits of one position."""
    return max(tokens * 2 * a.embedding_width, a.embedding_width + a.vocab_size) * ACTIVATION_BYTES


def peak_bytes(a: Architecture, precision: str, tokens: int) -> int:
    """Bytes that must fit in memory: weights, the full KV cache, and the activations of `tokens` prompt tokens at once.

    This is arithmetic, not a measurement. A runtime adds its own code and workspace (docs/stored-bytes.md).
    """
    layers = max(layer_activation_bytes(a, block, tokens) for block in a.blocks)
    cache = kv_bytes(a, element_bytes=cache_element_bytes(precision))
    return weight_bytes(a, precision) + cache + max(layers, end_activation_bytes(a, tokens))
