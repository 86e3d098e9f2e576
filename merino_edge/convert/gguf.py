"""Reading of GGUF files (of llama.cpp): weights are dequantised to float32, the tokenizer is rebuilt from metadata.

The architectures are llama (also SmolLM2, Mistral), qwen2 and gpt2. The tokenizers are byte-level BPE ("gpt2") of the
kinds in `PRE_TOKENIZERS`. Any other kind, unknown metadata of the architecture and weights without equivalent are
refused by name. merino_edge.convert.gguf_file reads the file itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from merino_edge import artefact, limits
from merino_edge.architecture import Architecture, Block
from merino_edge.convert.end_tokens import end_token_ids
from merino_edge.convert.gguf_file import GgufFile, Tensor
from merino_edge.convert.imported import Imported, OnWeight, bind_template, check_tokenizer, convert_weights
from merino_edge.convert.layouts import Layout, split_fused
from merino_edge.errors import ArchitectureError, ArtefactError, UnsupportedError, require
from merino_edge.tokenizer import ChatFormat

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")


def read(path: Path, on_weight: OnWeight, chat_template: str | None = None) -> Imported:
    """Read the model in the GGUF file `path`, with `chat_template` in place of its own unless None.

    Raises UnsupportedError, ArtefactError, MissingExtraError.
    """
    require("gguf", "import")
    file = GgufFile(path)
    m, tensors = Metadata(file.values, str(path)), file.tensors
    family = m.need("general.architecture", str)
    if family not in LAYOUTS:
        raise UnsupportedError(
            f"{path}: architecture {family!r} is not supported", f"choose one of {', '.join(LAYOUTS)}"
        )
    try:
        a = _architecture(m, family, tensors)
    except ArchitectureError as error:
        raise UnsupportedError(f"{path}: {error.message}", "choose another model") from None
    backend = _tokenizer(m)
    chat = _chat(m, backend, chat_template)
    notes = check_tokenizer(backend, a.vocab_size, chat, str(path))
    weights = convert_weights(
        a,
        LAYOUTS[family],
        tensors,
        lambda name: _dequantised(tensors[name], path),
        where=str(path),
        on_weight=on_weight,
    )
    source = {"format": "gguf", "family": family, "name": path.name, "files": {path.name: artefact.sha256_file(path)}}
    return Imported(a, weights, str(backend.to_str(pretty=True)), chat, source, notes)


# --- metadata -------------------------------------------------------------------------------------


class Metadata:
    """The file's key-value pairs, typed. Raises ArtefactError naming the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value, or None where the key is missing. For kind `list` it is the whole array."""
        if key not in self.values:
            return None
        value = self.values[key]
        try:
            if isinstance(value, bytes):
                value = value.decode()
            elif isinstance(value, list):
                value = [item.decode() for item in value]
            elif isinstance(value, np.ndarray) and kind is list:
                value = value.tolist()
        except UnicodeDecodeError:
            value = None
        if type(value) is not kind:
            raise ArtefactError(f"{self.where}: {key} is not {kind.__name__}", "it is damaged; download it again")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """The value of a key that must be present."""
        value = self.get(key, kind)
        if value is None:
            raise ArtefactError(f"{self.where} has no {key}", "it is damaged, or its kind of model is not supported")
        return value

    def whole(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self.need(key, int)
        if value < 1:
            raise ArtefactError(f"{self.where}: {key} is {value}", "it is damaged; download it again")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 as its shortest decimal: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key, float) if default is not None else self.need(key, float)
        with np.errstate(over="ignore"):  # the architecture refuses what is not finite
            return float(str(np.float32(default if value is None else value)))


# --- architecture and weights ----------------------------------------------------------------------

UNDERSTOOD = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
)


def _architecture(m: Metadata, family: str, tensors: Mapping[str, Tensor]) -> Architecture:
    for key in m.values:
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in UNDERSTOOD:
            raise UnsupportedError(f"{m.where}: {key} is not supported", "choose another model")
    width, heads = m.whole(f"{family}.embedding_length"), m.whole(f"{family}.attention.head_count")
    head_dim = m.get(f"{family}.attention.key_length", int) or width // heads
    for key, only in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("rope.scaling.type", "none"),
    ):
        value = m.get(f"{family}.{key}", type(only))
        if value is not None and value != only:
            raise UnsupportedError(f"{m.where}: {family}.{key} {value} is not supported", "choose another model")
    kv_heads = m.get(f"{family}.attention.head_count_kv", int)
    layers, ffn_width = m.whole(f"{family}.block_count"), m.whole(f"{family}.feed_forward_length")
    common: dict[str, Any] = {
        "vocab_size": len(m.need("tokenizer.ggml.tokens", list)),
        "max_positions": m.whole(f"{family}.context_length"),
        "embedding_width": width,
        "head_dim": head_dim,
        "blocks": (Block(width, layers, heads, heads if kv_heads is None else kv_heads, ffn_width),),
        "tied_head": "output.weight" not in tensors,
    }
    if family == "gpt2":
        return Architecture(**common, norm_epsilon=m.real("gpt2.attention.layer_norm_epsilon"), ffn="gelu_tanh")
    return Architecture(
        **common,
        norm="rmsnorm",
        norm_epsilon=m.real(f"{family}.attention.layer_norm_rms_epsilon"),
        ffn="swiglu",
        positions="rotary",
        rotary_dim=head_dim,
        rotary_base=m.real(f"{family}.rope.freq_base", 10000.0),
        bias="qkv" if family == "qwen2" else "none",
    )


def _adapt_llama(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """Query and key rows in our order. llama.cpp rotates neighbours: [H, D/2, 2, W] instead of [H, 2, D/2, W]."""
    if ours[0].split(".")[-2] not in ("query", "key"):
        return [array]
    paired = array.reshape(-1, a.head_dim // 2, 2, array.shape[-1])
    return [paired.swapaxes(1, 2).reshape(array.shape)]


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
_FUSED = {**_INSIDE, "attn_qkv": "attention.query attention.key attention.value"}
LAYOUTS = {
    "llama": Layout(_OUTSIDE, "blk.", _INSIDE, _adapt_llama),
    "qwen2": Layout(_OUTSIDE, "blk.", _INSIDE),
    "gpt2": Layout({**_OUTSIDE, "position_embd": "positions"}, "blk.", _FUSED, split_fused),
}


def _dequantised(tensor: Tensor, path: Path) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        with np.errstate(all="ignore"):  # what is not finite is refused later
            return np.asarray(dequantize(tensor.data, tensor.kind), np.float32)
    except NotImplementedError:
        raise UnsupportedError(
            f"{path}: {tensor.name} is {tensor.kind.name}, which cannot be read", "choose another quantisation"
        ) from None


# --- tokenizer and chat ----------------------------------------------------------------------------

# From the tokenizer.json of the model cards: a regular expression, or a name of the `tokenizers` library.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {"gpt-2": "", "smollm": "digits", "llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}
CONTROL, USER_DEFINED = 3, 4  # token types that are recognised before BPE; a normal token is 1


def _tokenizer(m: Metadata) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
    from tokenizers.pre_tokenizers import Sequence as Sequenced

    model, kind = m.need("tokenizer.ggml.model", str), m.need("tokenizer.ggml.pre", str)
    if model != "gpt2" or kind not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{m.where}: tokenizer {model!r} of kind {kind!r} is not supported",
            f"choose a model with tokenizer 'gpt2' of kind {', '.join(PRE_TOKENIZERS)}",
        )
    tokens = [str(token) for token in m.need("tokenizer.ggml.tokens", list)]
    types = m.need("tokenizer.ggml.token_type", list)
    pairs = (str(merge).partition(" ") for merge in m.need("tokenizer.ggml.merges", list))
    merges = [(left, right) for left, _, right in pairs]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ArtefactError(f"{m.where}: the tokenizer's lists do not fit together", "it is damaged; download it again")
    try:
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "llama-bpe"))
    except Exception as error:  # the library raises bare Exception
        raise ArtefactError(f"{m.where}: its tokenizer is inconsistent ({error})", "download it again") from None
    pattern = PRE_TOKENIZERS[kind]
    steps: list[PreTokenizer] = [ByteLevel(add_prefix_space=False, use_regex=pattern in ("", "digits"))]
    if pattern == "digits":
        steps.insert(0, Digits(individual_digits=True))
    elif pattern:
        steps.insert(0, Split(Regex(pattern), "isolated"))
    backend.pre_tokenizer = Sequenced(steps)
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    added = [(token, form) for token, form in zip(tokens, types, strict=True) if form in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, special=form == CONTROL, normalized=False) for token, form in added])
    return backend


# Special tokens by their names in templates and in the metadata, where one is misspelled.
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
SPECIAL_TOKENS |= {"cls": "cls", "mask": "mask"}


def _chat(m: Metadata, backend: tokenizers.Tokenizer, template: str | None) -> ChatFormat:
    eos = end_token_ids(
        (_token_id(m, name) for name in ("eos", "eot", "eom")), backend.get_vocab(with_added_tokens=True)
    )
    bos = _token_id(m, "bos")
    prepends = m.get("tokenizer.ggml.add_bos_token", bool)
    if prepends is None:
        prepends = m.get("tokenizer.ggml.pre", str) == "llama-bpe"  # llama.cpp's default for this kind
    ids = {name: _token_id(m, key) for name, key in SPECIAL_TOKENS.items()}
    tokens = {f"{name}_token": None if i is None else backend.id_to_token(i) for name, i in ids.items()}
    template = m.get("tokenizer.chat_template", str) if template is None else template
    template = bind_template(template, m.where, **tokens)
    return ChatFormat(eos, bos if prepends else None, template)


def _token_id(m: Metadata, name: str) -> int | None:
    value = m.get(f"tokenizer.ggml.{name}_token_id", int)
    if value is not None:
        limits.check_range(f"{m.where}: {name}_token_id", value, 0, limits.MAX_VOCAB_SIZE, ArtefactError)
    return value
