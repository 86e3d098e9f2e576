"""Stored weights and peak memory as sums: what must fit while a bundle is loaded and while it runs.

Peak memory is counted by the engine that runs the target's bundle:

| target | peak memory is | checked by |
|---|---|---|
| onnxruntime | the larger of two sums: while it loads, and while it runs a full cache | benchmarks/peak_memory.py |
| for TensorRT | weights as stored, cache, and what the compiler reserves | benchmarks/engine_memory.py |
| onnxruntime-cuda, none | weights as stored, a GPU's cache, and activations of a prompt | nothing: arithmetic |

ONNX Runtime's CPU engine holds matrices in the form that its kernels read, not as they are stored. At fp16 they are
float32. Codes have three float32 numbers a block beside them: the scale, the packed scale, and a sum. Of the embedding
table it holds the rows that were looked up. While it loads, the head as stored is held beside the packed one.

TensorRT reserves memory for its longest prompt, whatever prompt is run, and apart from that for a step of one token.
docs/stored-bytes.md has every formula. What CUDA itself takes is not counted.
"""

from __future__ import annotations

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.search.additive_cost import AdditiveCost
from merino_edge.storage import INT4_BLOCK, NORM_BYTES, rules_of, stored_as

# Measured with ONNX Runtime 1.32 on an x86 CPU with AVX2, without AVX-512 (docs/stored-bytes.md).
CPU_BYTES = 11_000_000  # of the library's code that runs, and of an open session
CPU_LAYER_BYTES = 136_000  # of a layer's nodes and kernels
CPU_ARENA = 1.5  # the memory that activations take, over those that are held at once
CPU_CHUNK = 128  # most tokens of one step: PREFILL_CHUNK of merino_edge.runtime.engines.onnx_engine
CPU_BLOCK_BYTES = 12  # of the numbers beside a block of codes
LARGEST_HEAD_BLOCK = 256  # the head's block is the largest power of two that divides its width, up to this
WIDENED_SHARE = 5 / 8  # of a layer of each block, which is widened to float32 at loading: freed, but not returned


def weights(precision: str, target: str | None) -> AdditiveCost:
    """Bytes of the stored weights."""
    return AdditiveCost(
        lambda a, block, own: counts.block_weight_bytes(a, block, own or precision, target),
        lambda before, after: counts.width_projection_bytes(before, after, precision, target),
        lambda a: counts.end_weight_bytes(a, precision, target),
    )


def peak_sums(precision: str, target: str | None, tokens: int) -> tuple[AdditiveCost, ...]:
    """The sums whose largest is the peak memory in bytes, for a prompt of which `tokens` run at once."""
    if target == "onnxruntime":
        return _cpu_loading(precision), _cpu_running(precision, tokens)
    if rules_of(target).tensorrt:
        return (_tensorrt(precision, target),)
    return (_plain(precision, target, tokens),)


def _plain(precision: str, target: str | None, tokens: int) -> AdditiveCost:
    stored, element_bytes = weights(precision, target), counts.cache_element_bytes(precision, target)
    return AdditiveCost(
        lambda a, block, own: (
            stored.block(a, block, own) + counts.block_kv_bytes(a, block, a.max_positions, element_bytes)
        ),
        stored.change,
        stored.end,
        lambda a, block: counts.layer_activation_bytes(a, block, tokens),
        lambda a: counts.end_activation_bytes(a, tokens),
    )


# --- ONNX Runtime's CPU engine ---------------------------------------------------------------------


def _cpu_matrix_bytes(precision: str) -> float:
    """Bytes of an element of a matrix as it is held."""
    bits = {"int8": 8, "int4": 4}.get(precision, 0)
    return bits / 8 + CPU_BLOCK_BYTES / INT4_BLOCK if bits else 4.0


def _cpu_block_bytes(a: Architecture, block: Block, precision: str) -> float:
    matrices, vectors = counts.layer_matrix_parameters(a, block), counts.layer_vector_parameters(a, block)
    held = matrices * _cpu_matrix_bytes(precision) + vectors * NORM_BYTES
    return block.weight_layers * held + block.layers * CPU_LAYER_BYTES


def _cpu_projection_bytes(before: int, after: int, precision: str) -> float:
    return counts.width_projection_parameters(before, after) * _cpu_matrix_bytes(precision)


def _cpu_end_bytes(a: Architecture, precision: str) -> float:
    """Bytes of head, projections, angles and the library."""
    width, table = a.embedding_width, a.vocab_size * a.embedding_width
    held = 4.0 * table
    if precision in ("int8", "int4"):  # the head has 8 bits
        held = table + CPU_BLOCK_BYTES * table / min(width & -width, LARGEST_HEAD_BLOCK)
    for before, after in ((width, a.blocks[0].width), (a.blocks[-1].width, width)):
        held += _cpu_projection_bytes(before, after, precision)
    return held + a.max_positions * a.rotary_dim * 4 + CPU_BYTES


def _cpu_loading(precision: str) -> AdditiveCost:
    """The largest matrix is nearly always the head, which comes last: it is held twice."""

    def block_bytes(a: Architecture, block: Block, own: str | None) -> float:
        name = own or precision
        widened = WIDENED_SHARE if name == "fp16" else 0.0
        return _cpu_block_bytes(a, block, name) + 4 * widened * counts.layer_matrix_parameters(a, block)

    def end_bytes(a: Architecture) -> float:
        head = stored_as(precision, "onnxruntime").head
        second = 4.0 if head.bits == 16 else head.bits / 8  # float16 is widened before it is packed
        return _cpu_end_bytes(a, precision) + second * a.vocab_size * a.embedding_width

    return AdditiveCost(block_bytes, lambda before, after: _cpu_projection_bytes(before, after, precision), end_bytes)


def _cpu_running(precision: str, tokens: int) -> AdditiveCost:
    """Every position of the cache is filled, and as many rows of the embedding table were looked up."""
    stored, step = stored_as(precision, "onnxruntime"), min(tokens, CPU_CHUNK)

    def block_bytes(a: Architecture, block: Block, own: str | None) -> float:
        kept = counts.kept_positions(block, a.max_positions, "onnxruntime")
        cache = counts.block_kv_bytes(a, block, kept, stored.cache_bytes)
        return _cpu_block_bytes(a, block, own or precision) + cache

    def end_bytes(a: Architecture) -> float:
        rows = stored.embedding.bytes(min(a.vocab_size, a.max_positions), a.embedding_width)
        return _cpu_end_bytes(a, precision) + rows + stored.positions.bytes(a.position_rows, a.blocks[0].width)

    def activation_bytes(a: Architecture, block: Block) -> float:
        """Scores of all heads over the full cache; the residual stream, its norm, query and result; and the FFN's."""
        ffn = (4 if a.gated else 3) * block.ffn_width
        width = 2 * block.width + 2 * block.heads * a.head_dim
        elements = step * (block.heads * a.max_positions + width + ffn)
        return CPU_ARENA * elements * counts.ACTIVATION_BYTES

    return AdditiveCost(
        block_bytes,
        lambda before, after: _cpu_projection_bytes(before, after, precision),
        end_bytes,
        activation_bytes,
        lambda a: counts.end_activation_bytes(a, step),
    )


# --- TensorRT --------------------------------------------------------------------------------------

# What TensorRT for RTX 1.7 reserves when it compiles for SM86 (benchmarks/engine_memory.py). No board was measured.
ENGINE_CHUNK = 512  # tokens of the longest prompt: PREFILL_CHUNK of merino_edge.export.tensorrt
ENGINE_BYTES = 16_450_000  # workspace of both profiles
ENGINE_ROWS = 8  # rows of logits: MAX_LOGIT_ROWS of merino_edge.graph_io
STEP_FFN_BYTES = 283  # of a step of one token, for each hidden number of an FFN


def _tensorrt(precision: str, target: str | None) -> AdditiveCost:
    stored, form = weights(precision, target), stored_as(precision, target)
    element = form.cache_bytes
    copies = rules_of(target).lowerings_at(precision)[0] == "primitive"  # it returns the new keys and values

    def block_bytes(a: Architecture, block: Block, own: str | None) -> float:
        positions = a.max_positions + (min(ENGINE_CHUNK, a.max_positions) if copies else 0)
        return stored.block(a, block, own) + counts.block_kv_bytes(a, block, positions, element)

    def end_bytes(a: Architecture) -> float:
        widened = 2 * a.vocab_size * a.embedding_width if form.splits_table else 0  # an int8 head, at a step of one row
        return stored.end(a) + ENGINE_BYTES + widened + ENGINE_ROWS * a.vocab_size * counts.ACTIVATION_BYTES

    def activation_bytes(a: Architecture, block: Block) -> float:
        """Of a step of one token, and of a prompt: keys for all heads, a mask or scores, residual stream and FFN."""
        context, width = a.max_positions, block.width
        tokens = min(ENGINE_CHUNK, context)
        step = context * width * element + STEP_FFN_BYTES * block.ffn_width
        if not copies:
            return step + tokens * (4 * context + 5.5 * width + 5 * block.ffn_width)
        scores = (4 + element) * block.heads * (context + tokens)  # float32, and in the type of matrices
        return step + tokens * (scores + (20 + 3 * element) * width)

    return AdditiveCost(block_bytes, stored.change, end_bytes, activation_bytes, lambda a: 0.0)
