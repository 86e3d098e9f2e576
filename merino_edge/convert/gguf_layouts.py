"""The tensors of GGUF's model families, by their names: what each is of ours, and how some are fused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from merino_edge.convert.layouts import Layout, split_stacked

_OUTSIDE = {"token_embd": "embedding", "output_norm": "final_norm", "output": "head"}
_INSIDE = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.gate",
    "ffn_up": "ffn.up",
    "ffn_down": "ffn.down",
}
QK_NORMS = {"attn_q_norm": "attention.query_norm", "attn_k_norm": "attention.key_norm"}
FOUR_NORMS = {"post_attention_norm": "attention_output_norm", "post_ffw_norm": "ffn_output_norm"}
NORMS_AFTER = {"post_attention_norm": "attention_norm", "post_ffw_norm": "ffn_norm"}
NO_NORMS_BEFORE = ("attn_norm", "ffn_norm")
SPLIT_QKV = ("attn_q", "attn_k", "attn_v")
QKV = {"attn_qkv": "attention.query attention.key attention.value"}
GATE_AND_UP = {"ffn_up": "ffn.gate ffn.up"}


def layout(more: Mapping[str, str] | None = None, *, without: Collection[str] = ()) -> Layout:
    """The usual tensors with `more` and `without` some."""
    kept = {theirs: ours for theirs, ours in _INSIDE.items() if theirs not in without}
    return Layout(_OUTSIDE, "blk.", {**kept, **(more or {})}, split_stacked)


def reading(written: Layout) -> Layout:
    """A layout for reading: files may or may not fuse query, key and value, whatever the family's usual ones do."""
    apart = {name: _INSIDE[name] for name in SPLIT_QKV}
    return Layout(written.outside, written.layer, {**QKV, **apart, **written.inside}, written.adapt)


PLAIN = layout()
FUSED_GATE = layout(GATE_AND_UP, without=("ffn_gate",))
PHI3 = layout({**QKV, **GATE_AND_UP}, without=(*SPLIT_QKV, "ffn_gate"))
GLM4 = layout({**GATE_AND_UP, **FOUR_NORMS}, without=("ffn_gate",))
UNGATED = layout(without=("ffn_gate",))
GPT2 = Layout(
    {**_OUTSIDE, "position_embd": "positions"},
    "blk.",
    layout(QKV, without=(*SPLIT_QKV, "ffn_gate")).inside,
    split_stacked,
)
