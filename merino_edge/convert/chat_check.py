"""A check of a model's chat format: what would fail in a chat fails at the import, and what is odd is said."""

from __future__ import annotations

from merino_edge.errors import InputError, MerinoError, UnsupportedError
from merino_edge.tokenizer import Message, Tokenizer

QUESTION = "What is two and two?"
USER: Message = {"role": "user", "content": QUESTION}
ANSWER: Message = {"role": "assistant", "content": "It is four."}
SYSTEM: Message = {"role": "system", "content": "Answer in one word only."}
OTHER_TEMPLATE = "give another: --chat-template FILE.jinja, or an empty file for none"


def check_chat(tokenizer: Tokenizer, where: str) -> list[str]:
    """What a user should know of the model's end tokens and template, a line each.

    The template renders a question, and a second one after an answer. Raises UnsupportedError where it does not.
    """
    notes = []
    if not tokenizer.chat.eos_token_ids:
        notes.append("no file names an end token: answers go on to --max-tokens or a --stop TEXT")
    if tokenizer.chat.chat_template is None:
        return notes
    for messages in ([USER], [USER, ANSWER, USER]):
        try:
            text = tokenizer.apply_template(messages)
            tokenizer.encode_chat(messages)
        except MerinoError as error:
            raise UnsupportedError(f"{where}: {error.message}", OTHER_TEMPLATE) from None
        if QUESTION not in text:
            raise UnsupportedError(f"{where}: the chat template leaves the question out", OTHER_TEMPLATE)
    try:
        if tokenizer.drops_system([SYSTEM, USER]):
            notes.append("the chat template leaves system messages out")
    except InputError as error:
        notes.append(error.message.replace("this conversation", "system messages", 1))
    except MerinoError as error:
        notes.append(f"with a system message {error.message}")
    return notes
