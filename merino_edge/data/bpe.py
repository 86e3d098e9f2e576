"""Tokenizer training: byte-level BPE, its special tokens and its two chat formats.

A model trained on plain text continues text and stops where a document ends. A model trained on conversations
(merino_edge.data.conversation) speaks ChatML. This module knows no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from merino_edge.foreign_call import call
from merino_edge.tokenizer import ChatFormat

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
TURN_BEGINS, TURN_ENDS = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_BEGINS, TURN_ENDS)
END_OF_TEXT_ID, TURN_ENDS_ID = 0, 2  # the trainer numbers special tokens first
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte, and the special tokens

# A model trained on plain text continues text: the conversation so far, one message after the other.
CONTINUATION_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer (no prefix space). A small corpus gives fewer than `vocab_size` tokens.

    Raises ArtefactError where the library fails, as without memory for its threads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = (document for text in texts for document in text.split(END_OF_TEXT))
    call(
        lambda: tokenizer.train_from_iterator(documents, trainer),
        "the tokenizer cannot be trained",
        "free some memory, or give another text",
    )
    return tokenizer


def chat_format(*, conversations: bool = False) -> ChatFormat:
    """The chat format of a model trained on plain text, or on conversations."""
    if conversations:
        return ChatFormat((TURN_ENDS_ID, END_OF_TEXT_ID), None, CHATML_TEMPLATE)
    return ChatFormat((END_OF_TEXT_ID,), None, CONTINUATION_TEMPLATE)


def for_conversations(backend: tokenizers.Tokenizer, chat: ChatFormat) -> ChatFormat:
    """`chat`; or ChatML, where `chat` does not mark roles and the tokenizer has the tokens of ChatML."""
    begins, ends = (backend.token_to_id(token) for token in (TURN_BEGINS, TURN_ENDS))
    if chat.chat_template not in (None, CONTINUATION_TEMPLATE) or begins is None or ends is None:
        return chat
    return ChatFormat(
        tuple(dict.fromkeys((ends, *chat.eos_token_ids))), chat.bos_token_id, CHATML_TEMPLATE, chat.stop_strings
    )
