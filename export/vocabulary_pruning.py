"""Which tokens a bundle's head keeps, where it does not keep all: those of a text, and what any text can be made of.

The head is the largest matrix of a small model, and a step reads all of it. Tokens that its text never holds can go;
special tokens and single bytes stay, so that an answer can end and any word can still be spelled. Prompts may hold
every token: embeddings all stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from merino_edge.errors import InputError
from merino_edge.tokenizer import Tokenizer

PIECES_AT_ONCE = 64


def pruned_vocab(tokenizer: Tokenizer, text: Iterable[str], vocab_size: int) -> np.ndarray:
    """Ids, rising, int64: of everything that the pieces of `text` are made of, of special tokens and of bytes.

    Ids from `vocab_size` on, which the model does not have, are left out. Raises InputError where the text is empty.
    """
    seen = np.zeros(max(vocab_size, tokenizer.vocab_size), bool)
    pieces = iter(text)
    while some := list(islice(pieces, PIECES_AT_ONCE)):
        for encoding in tokenizer.backend.encode_batch(some, add_special_tokens=False):
            seen[encoding.ids] = True
    special = list(_special(tokenizer))
    seen[special] = False  # that a document ends is no text
    if not seen.any():
        raise InputError("the text to keep the vocabulary of is empty", "give --keep-vocab a text with words in it")
    seen[[*special, *_bytes(tokenizer)]] = True
    found = np.flatnonzero(seen)
    return found[found < vocab_size]


def _special(tokenizer: Tokenizer) -> Iterator[int]:
    yield from tokenizer.backend.get_added_tokens_decoder()
    yield from tokenizer.chat.eos_token_ids
    if tokenizer.chat.bos_token_id is not None:
        yield tokenizer.chat.bos_token_id


def _bytes(tokenizer: Tokenizer) -> Iterator[int]:
    """Of tokens that are one byte, as byte-level BPE and as byte fallback write them."""
    from tokenizers.pre_tokenizers import ByteLevel

    for token in (*ByteLevel.alphabet(), *(f"<0x{byte:02X}>" for byte in range(256))):
        if (token_id := tokenizer.backend.token_to_id(token)) is not None:
            yield token_id
