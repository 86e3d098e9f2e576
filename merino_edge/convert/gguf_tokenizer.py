"""The tokenizer in a GGUF file's metadata, rebuilt for the `tokenizers` library.

`tokenizer.ggml.model` is "gpt2" (BPE over bytes), "llama" (BPE of SentencePiece, ordered by scores) or "t5" (Unigram).
A file names how BPE divides a text by `tokenizer.ggml.pre`: a kind of `KINDS`, or another name of one. What llama.cpp
does by default where the metadata is silent is done here too. It would also end a prompt with an end token where
`add_eos_token` is set; a model that is asked to go on never wants that.
Sources: the tokenizer.json of the model cards; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from merino_edge import limits, tokenizer_file
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.errors import ArtefactError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
RECOGNISED = (CONTROL, USER_DEFINED)  # found in a text before anything else
MOST_WORK = 2e9  # characters that are looked at for merges; 65 million for the largest vocabularies
SPACE = "▁"  # how SentencePiece spells a space

# --- how BPE divides a text ------------------------------------------------------------------------

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s|" + _END
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s|"
_CASED += r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = _CASELESS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DIGITS = "digits"  # each digit is a word, then GPT-2's rule


class Kind(NamedTuple):
    """How a text is divided before BPE."""

    patterns: tuple[str, ...]  # each divides what the one before left; none: GPT-2's rule
    whole_words: bool = False  # a word that is a token stays whole, whatever its merges say
    bos: bool = False  # a text begins with BOS where the file does not say
    nfc: bool = False


KINDS = {
    "gpt-2": Kind(()),
    "smollm": Kind((DIGITS,)),
    "llama-bpe": Kind((_WORDS % r"\p{N}{1,3}",), whole_words=True, bos=True),
    "dbrx": Kind((_WORDS % r"\p{N}{1,3}",)),
    "qwen2": Kind((_WORDS % r"\p{N}",), nfc=True),
    "stablelm2": Kind((_WORDS % r"\p{N}",)),
    "qwen35": Kind((_MARKS,), nfc=True),
    "tekken": Kind((_CASED % ("", "", r"\p{N}"),), whole_words=True, bos=True),
    "gpt-4o": Kind((_CASED % (_CASELESS + "?", _CASELESS + "?", r"\p{N}{1,3}"),)),
    "deepseek-v3": Kind(_DEEPSEEK),
    "deepseek-coder": Kind((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
}
# Other names of a kind. llama.cpp divides and merges a text alike for all of one line.
ALIASES = {
    "gpt-2": "phi-2 mpt olmo jais exaone4 gigachat a.x-4.0 mellum trillion granite-docling modern-bert",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "smaug-bpe glm4 chatglm-bpe",
    "qwen2": "deepseek-r1-qwen megrez kormo f2llmv2",
    "stablelm2": "hunyuan solar-open grok-2",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm",
}
_KIND_OF = {name: kind for kind in KINDS for name in (kind, *ALIASES.get(kind, "").split())}


def build(m: Metadata) -> tokenizers.Tokenizer:
    """The tokenizer. Raises UnsupportedError for a kind that is not known, ArtefactError for lists that do not fit."""
    model = m.need("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_bpe, "llama": _sentencepiece, "t5": _unigram}
    if model not in builders:
        raise UnsupportedError(
            f"{m.where}: tokenizer {model!r} is not supported", f"choose a model with one of {', '.join(builders)}"
        )
    tokens = _tokens(m)
    types = m.get("tokenizer.ggml.token_type", list) or [NORMAL] * len(tokens)
    fit = len(set(tokens)) == len(tokens) == len(types) and all(type(kind) is int for kind in types)
    if not fit:
        raise ArtefactError(f"{m.where}: the tokenizer's lists do not fit together", "it is damaged; download it again")
    try:
        backend = builders[model](m, tokens, types)
    except (ArtefactError, UnsupportedError):
        raise
    except Exception as error:  # the library raises bare Exception
        raise ArtefactError(f"{m.where}: its tokenizer is inconsistent ({error})", "download it again") from None
    _add(m, backend, tokens, types, RECOGNISED if model == "gpt2" else (*RECOGNISED, UNKNOWN))
    return backend


def adds_bos(m: Metadata) -> bool:
    """Whether a text begins with BOS: as the file says, else as llama.cpp does for its kind of tokenizer."""
    said = m.get("tokenizer.ggml.add_bos_token", bool)
    if said is not None:
        return said
    if m.need("tokenizer.ggml.model", str) == "gpt2":
        return _kind(m).bos
    return m.need("tokenizer.ggml.model", str) == "llama"


def _tokens(m: Metadata) -> list[str]:
    tokens = [str(token) for token in m.need("tokenizer.ggml.tokens", list)]
    longest = max(map(len, tokens), default=0)
    if longest > limits.MAX_TOKEN_CHARACTERS:
        what = f"a token of {longest} characters, the limit is {limits.MAX_TOKEN_CHARACTERS}"
        raise ArtefactError(f"{m.where} has {what}", "it is damaged; download it again")
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp calls them


def _add(
    m: Metadata, backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int], kinds: Sequence[int]
) -> None:
    """Tell the library which tokens are found in a text before anything else."""
    from tokenizers import AddedToken

    name = (m.get("general.name", str) or "").lower()
    phi3 = "phi-3" in name or "phi3" in name  # its tokens swallow the space behind them
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    backend.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False, rstrip=phi3 and token not in keeps)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds
        ]
    )


# --- BPE over bytes --------------------------------------------------------------------------------


def _kind(m: Metadata) -> Kind:
    name = m.need("tokenizer.ggml.pre", str)
    if name not in _KIND_OF:
        raise UnsupportedError(
            f"{m.where}: tokenizer 'gpt2' of kind {name!r} is not supported",
            f"choose a model with one of the kinds {', '.join(_KIND_OF)}",
        )
    return KINDS[_KIND_OF[name]]


def steps(kind: Kind) -> tuple[Any, Any]:
    """The library's normalizer, if any, and its pre-tokenizer that divide a text as `kind`."""
    from tokenizers import Regex, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
    from tokenizers.pre_tokenizers import Sequence as Sequenced

    own_rule = kind.patterns in ((), (DIGITS,))
    divide: list[PreTokenizer] = [
        Digits(individual_digits=True) if pattern == DIGITS else Split(Regex(pattern), "isolated")
        for pattern in kind.patterns
    ]
    divider = Sequenced([*divide, ByteLevel(add_prefix_space=False, use_regex=own_rule)])
    return (normalizers.NFC() if kind.nfc else None), divider


def _byte_bpe(m: Metadata, tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    kind = _kind(m)
    merges = []
    for merge in m.need("tokenizer.ggml.merges", list):
        space = str(merge).find(" ", 1)  # the first part may be a space itself
        merges.append((str(merge)[:space], str(merge)[space + 1 :]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.whole_words))
    normalizer, backend.pre_tokenizer = steps(kind)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    return backend


# --- SentencePiece ---------------------------------------------------------------------------------


def _scores(m: Metadata, tokens: Sequence[str]) -> list[float]:
    scores = m.need("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens) or not np.isfinite(np.asarray(scores, np.float64)).all():
        raise ArtefactError(f"{m.where}: the scores of its tokens do not fit", "it is damaged; download it again")
    return [float(score) for score in scores]


def _unknown(m: Metadata, tokens: Sequence[str], default: int) -> int:
    unknown = m.get("tokenizer.ggml.unknown_token_id", int)
    return unknown if unknown is not None and 0 <= unknown < len(tokens) else min(default, len(tokens) - 1)


def _prefix(m: Metadata) -> bool:
    said = m.get("tokenizer.ggml.add_space_prefix", bool)
    return True if said is None else said


def _sentencepiece(m: Metadata, tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    """BPE that joins the pair whose whole has the highest score, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _scores(m, tokens)
    if (work := sum(len(token) ** 2 for token in tokens)) > MOST_WORK:  # each place where a token could be made of two
        what = f"its tokens are so long that joining takes {work:.1g} steps"
        raise ArtefactError(f"{m.where}: {what}", "it is damaged; download it again")
    pieces = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, UNUSED)}
    found = []
    for token, i in pieces.items():
        for at in range(1, len(token)):
            left, right = pieces.get(token[:at]), pieces.get(token[at:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
    found.sort()
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(tokens[left], tokens[right]) for _, _, left, right in found],
            unk_token=tokens[_unknown(m, tokens, 0)],
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    prefix = _prefix(m)
    spaced = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaced]) if prefix else spaced
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _unigram(m: Metadata, tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    """The division of a text whose pieces have the highest sum of scores."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    if m.get("tokenizer.ggml.treat_whitespace_as_suffix", bool):
        raise UnsupportedError(f"{m.where}: treat_whitespace_as_suffix is not supported", "choose another model")
    scores = _scores(m, tokens)
    least = min((score for score, kind in zip(scores, types, strict=True) if kind == NORMAL), default=0.0)
    scores = [score if kind in (NORMAL, UNUSED) else least for score, kind in zip(scores, types, strict=True)]
    backend = Tokenizer(
        models.Unigram(list(zip(tokens, scores, strict=True)), _unknown(m, tokens, 2), byte_fallback=False)
    )
    steps: list[normalizers.Normalizer] = []
    charsmap = m.get("tokenizer.ggml.precompiled_charsmap", list)
    if charsmap:
        data = bytes(value & 0xFF for value in charsmap)
        tokenizer_file.check_charsmap(data, m.where)
        steps.append(normalizers.Precompiled(data))
    if m.get("tokenizer.ggml.remove_extra_whitespaces", bool):
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if _prefix(m):  # but not before spaces alone
        steps += [normalizers.Prepend(SPACE), normalizers.Replace(Regex(rf"\A{SPACE}(?= +\z)"), "")]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    if _prefix(m):
        backend.decoder = decoders.Metaspace()
    return backend
