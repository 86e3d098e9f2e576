"""Vocabulary pruning: which tokens the head of a bundle keeps.

The head is the largest matrix of a small model, and every step reads all of it. So tokens that a given text never uses
can go. Special tokens and single bytes stay: an answer can still end, and any word can still be spelled.
Embeddings all stay, so prompts may use every token. This module knows no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from merino_edge.errors import InputError
from merino_edge.tokenizer import Tokenizer

PIECES_AT_ONCE = 64


def pruned_vocab(tokenizer: Tokenizer, text: Iterable[str], vocab_size: int) -> np.ndarray:
    """Ids [V'] int64, ascending, of the tokens in the pieces of `text`, of special tokens and of single bytes.

    Ids from `vocab_size` on are left out, since the model does not have them. Raises InputError where the text is
    empty.
    """
    highest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=0)
    used = np.zeros(max(vocab_size, highest + 1), bool)
    pieces = iter(text)
    while batch := list(islice(pieces, PIECES_AT_ONCE)):
        for encoding in tokenizer.encode_batch(batch):
            used[encoding.ids] = True
    special = list(_special_ids(tokenizer))
    used[special] = False  # the end of a document is no text
    if not used.any():
        raise InputError("the text to keep the vocabulary of is empty", "give --keep-vocab a text with words in it")
    used[[*special, *_byte_ids(tokenizer)]] = True
    token_ids = np.flatnonzero(used)
    return token_ids[token_ids < vocab_size]


def _special_ids(tokenizer: Tokenizer) -> Iterator[int]:
    yield from tokenizer.backend.get_added_tokens_decoder()
    yield from tokenizer.chat.eos_token_ids
    if tokenizer.chat.bos_token_id is not None:
        yield tokenizer.chat.bos_token_id


def _byte_ids(tokenizer: Tokenizer) -> Iterator[int]:
    """Ids of the tokens that are one byte, as byte-level BPE and as byte fallback write them."""
    from tokenizers.pre_tokenizers import ByteLevel

    for token in (*ByteLevel.alphabet(), *(f"<0x{byte:02X}>" for byte in range(256))):
        if (token_id := tokenizer.backend.token_to_id(token)) is not None:
            yield token_id
