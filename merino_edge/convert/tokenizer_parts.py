"""A tokenizer of a Hugging Face folder with `vocab.json` and `merges.txt`, or `tokenizer.model`: no `tokenizer.json`.

Such are older folders of GPT-2, OPT and Qwen2, and of Llama, Mistral and Gemma. The class in `tokenizer_config.json`
says how a text is divided; without one the model's type does. What is built of the former equals what transformers 5
makes of the same folder, and of `tokenizer.model` what SentencePiece does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merino_edge import artefact, limits, tokenizer_file
from merino_edge.convert import gguf_tokenizer, sentencepiece_file
from merino_edge.convert.gguf_tokenizer import KINDS, steps
from merino_edge.convert.weight_files import check_is_content
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.foreign_call import call

if TYPE_CHECKING:
    import tokenizers

VOCAB, MERGES, ADDED, SENTENCEPIECE = "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"
CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}  # and the same with Fast
OF_MODELS = {"gpt2": "GPT2Tokenizer", "opt": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
FIRST = "<|endoftext|>"  # the special tokens that a class has where no file names them
DEFAULTS = {
    "GPT2Tokenizer": {"unk_token": FIRST, "bos_token": FIRST, "eos_token": FIRST},
    "Qwen2Tokenizer": {"unk_token": FIRST, "eos_token": FIRST, "pad_token": FIRST},
}
# Those that are made of tokenizer.model (merino_edge.convert.sentencepiece_file). Both begin a text with their BOS.
LLAMA, GEMMA = "LlamaTokenizer", "GemmaTokenizer"
SENTENCEPIECE_MODELS = {"llama": LLAMA, "mistral": LLAMA, "phi3": LLAMA}
SENTENCEPIECE_MODELS |= {"gemma": GEMMA, "gemma2": GEMMA, "gemma3_text": GEMMA}
NAMED = ("unk_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")
CONVERT = "save it there: transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"


def build(folder: Path, settings: Mapping[str, Any], older: Mapping[str, Any], model: str) -> tokenizers.Tokenizer:
    """The tokenizer of `folder`. `settings` and `older`: tokenizer_config.json and special_tokens_map.json.

    `model` is the model's type. Raises ArtefactError (a file is missing or does not fit), UnsupportedError.
    """
    if not ((folder / VOCAB).is_file() and (folder / MERGES).is_file()):
        if (folder / SENTENCEPIECE).is_file():
            return _of_sentencepiece(folder, settings, older, model)
        raise ArtefactError(f"{folder / 'tokenizer.json'} is missing", CONVERT)
    name = str(settings.get("tokenizer_class") or OF_MODELS.get(model, "")).removesuffix("Fast")
    if name not in CLASSES or settings.get("add_prefix_space"):
        what = f"tokenizer_class {name[:60]!r}" if name not in CLASSES else "add_prefix_space"
        raise UnsupportedError(f"{folder}: {what} is not supported without a tokenizer.json", CONVERT)
    from tokenizers import Tokenizer, decoders, models, processors

    vocabulary = _object(folder / VOCAB)
    lines = artefact.read_text(folder / MERGES, limits.MAX_ARTEFACT_BYTES).split("\n")
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    try:
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for left, _, right in pairs]))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ArtefactError(f"{folder}: {VOCAB} and {MERGES} do not fit ({reason})", "download them again") from None
    normalizer, backend.pre_tokenizer = steps(KINDS[CLASSES[name]])
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    older = {**DEFAULTS[name], **older}
    _add(backend, folder, settings, older)
    first = _content({**older, **settings}.get("bos_token"))
    if settings.get("add_bos_token") is True and first:  # OPT's
        special = [(first, backend.token_to_id(first))]
        backend.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=special)
    return backend


def _of_sentencepiece(
    folder: Path, settings: Mapping[str, Any], older: Mapping[str, Any], model: str
) -> tokenizers.Tokenizer:
    """The tokenizer of `tokenizer.model`. Raises ArtefactError, UnsupportedError."""
    from tokenizers import Regex, normalizers, pre_tokenizers, processors

    name = str(settings.get("tokenizer_class") or SENTENCEPIECE_MODELS.get(model, "")).removesuffix("Fast")
    if name not in SENTENCEPIECE_MODELS.values():
        raise UnsupportedError(
            f"{folder}: tokenizer_class {name[:60]!r} is not supported without a tokenizer.json", CONVERT
        )
    check_is_content(folder / SENTENCEPIECE)
    file = sentencepiece_file.read(folder / SENTENCEPIECE)
    backend = gguf_tokenizer.build(file.metadata)
    normal: list[normalizers.Normalizer] = []
    if file.charsmap:
        tokenizer_file.check_charsmap(file.charsmap, file.metadata.where)
        normal.append(call(partial(normalizers.Precompiled, file.charsmap), file.metadata.where, CONVERT, quiet=True))
    if file.joins_spaces:
        normal += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normal:
        backend.normalizer = normalizers.Sequence([*normal, backend.normalizer])
    elif file.prefixes and settings.get("legacy") is False:  # no space behind special tokens, as in transformers
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    older = {"bos_token": file.begin, "eos_token": file.end, **older}
    _add(backend, folder, settings, older)
    first = _content({**older, **settings}.get("bos_token"))
    if settings.get("add_bos_token") is not False and first:
        special = [(first, backend.token_to_id(first))]
        backend.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=special)
    return backend


def _object(path: Path) -> dict[str, Any]:
    value = artefact.parse_json(artefact.read_text(path), str(path))
    if not isinstance(value, dict) or not all(type(i) is int and i >= 0 for i in value.values()):
        raise ArtefactError(f"{path} is no object of token ids", "download it again")
    return value


def _add(backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any], older: Mapping[str, Any]) -> None:
    """The added tokens by their ids, then the special tokens that have a name. Raises ArtefactError."""
    named = [{**older, **settings}.get(name) for name in NAMED]
    for name in LISTED:
        value = {**older, **settings}.get(name)
        named += value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    special = {_content(token): token for token in named if _content(token)}
    by_id: dict[int, Any] = {}
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        by_id = {int(i): token for i, token in decoder.items() if i.isdigit()}
    elif (folder / ADDED).is_file():
        by_id = {i: special.get(content, content) for content, i in _object(folder / ADDED).items()}
    for i, token in sorted(by_id.items()):
        _add_one(backend, token, special=_content(token) in special)
        if backend.token_to_id(_content(token)) != i:
            raise ArtefactError(
                f"{folder}: the added token {_content(token)[:40]!r} is not the id {i}", "download the folder again"
            )
    for token in special.values():
        if not any(_content(known) == _content(token) for known in by_id.values()):
            _add_one(backend, token, special=True)


def _content(token: Any) -> str:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def _add_one(backend: tokenizers.Tokenizer, token: Any, *, special: bool) -> None:
    from tokenizers import AddedToken

    fields = token if isinstance(token, dict) else {}
    given = {name: fields[name] for name in ("lstrip", "rstrip", "normalized") if isinstance(fields.get(name), bool)}
    special = special or fields.get("special") is True
    one = AddedToken(_content(token), special=special, **{"normalized": not special, **given})
    (backend.add_special_tokens if special else backend.add_tokens)([one])
