"""Small tokenizers of the kinds that public models have, each with special and with other added tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = "Hello there, the quick brown fox says: print <b> and | im end think. žluťoučký kůň 123\n\n"
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _added(backend: Tokenizer) -> Tokenizer:
    wide = "<|endoftext|>"  # takes the space after it, as Phi-3's tokens do
    backend.add_special_tokens([AddedToken(token, normalized=False, rstrip=token == wide) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool>")])
    return backend


def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's."""
    backend = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_of])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return _added(backend)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space before a text, and bytes for what is not in the vocabulary."""
    tokens = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "th", "t", "h", "e", "i", "m"]
    tokens += ["<", ">", "|", "_", "s", "/", "n", "d", "en", "im", "</", "▁t", "▁th"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("t", "h"), ("e", "n"), ("i", "m"), ("<", "/")]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _added(backend)


def unigram() -> Tokenizer:
    """Its vocabulary holds control tokens, which the model itself makes of a text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", -1.0), ("<|im_end|>", -1.0), ("▁", -3.0), ("▁the", -4.0)]
    pieces += [(character, -5.0) for character in "abcdefghijklmnopqrstuvwxyzHT<>|_/ ,.:"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return _added(backend)


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}
