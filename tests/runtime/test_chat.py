"""Chats: their messages and prompts, reuse of the cache, and conversations that no longer fit the context."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from helpers import small_tokenizers
from helpers.same_engine import SameEngine
from merino_edge.errors import InputError
from merino_edge.runtime.chat import Chat
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.grammar import Grammars
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import ChatFormat, Tokenizer

GREEDY = Sampling(greedy=True)


@pytest.fixture
def chat(engine: Engine, tokenizer: Tokenizer) -> Chat:
    return Chat(engine, tokenizer, GREEDY, max_tokens=12, system="Be brief.")


def test_each_turn_answers_the_whole_conversation(chat: Chat, engine: Engine, tokenizer: Tokenizer) -> None:
    for question in ("The quick", "brown fox", "jumps"):
        before = chat.messages
        answer = chat.send(question)
        text = "".join(answer)
        request = [*before, {"role": "user", "content": question}]
        assert chat.messages == [*request, {"role": "assistant", "content": text}]
        fresh = generate(
            Session(SameEngine(engine)), tokenizer, tokenizer.encode(tokenizer.apply_template(request)), GREEDY, 12
        )
        assert "".join(fresh) == text
    assert len(chat.messages) == 7
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_turn_runs_only_what_is_new(chat: Chat, tokenizer: Tokenizer) -> None:
    list(chat.send("The quick"))
    second = chat.send("brown fox")
    list(second)
    opening = tokenizer.encode("<system> Be brief.\n<user> The quick\n")
    assert second.statistics.reused_tokens >= len(opening)


def test_a_conversation_that_no_longer_fits_is_refused_and_kept(chat: Chat) -> None:
    refused = None
    for _ in range(100):
        before = chat.messages
        try:
            list(chat.send("lazy dog"))
        except InputError as error:
            refused = error
            break
    assert refused is not None
    assert "context of this bundle is 320" in str(refused) and "/reset" in str(refused)
    assert chat.messages == before
    chat.reset()
    answer = chat.send("lazy dog")
    list(answer)
    assert answer.finish_reason == "length"


def test_a_truncated_conversation_keeps_the_system_message_and_the_newest(
    chat: Chat, engine: Engine, tokenizer: Tokenizer
) -> None:
    chat.truncate_history, truncated = True, []
    for turn in range(40):
        before, question = chat.messages, f"lazy dog {turn}"
        answer = chat.send(question)
        text = "".join(answer)
        request = [before[0], *before[1 + chat.dropped :], {"role": "user", "content": question}]
        assert chat.messages == [*request, {"role": "assistant", "content": text}]
        assert answer.finish_reason == "length"  # never the context
        fresh = generate(Session(SameEngine(engine)), tokenizer, tokenizer.encode_chat(request), GREEDY, 12)
        assert "".join(fresh) == text
        if chat.dropped:
            assert chat.dropped % 2 == 0 and answer.statistics.prompt_tokens <= engine.max_positions // 2
            truncated.append(turn)
    assert len(truncated) >= 2 and truncated[1] - truncated[0] > 1
    with pytest.raises(InputError, match=r"the prompt has .* --context"):
        chat.send("The quick brown fox jumps. " * 50)


def test_a_first_message_that_does_not_fit_names_the_context(chat: Chat) -> None:
    with pytest.raises(InputError, match=r"the prompt has .* --context"):
        chat.send("The quick brown fox jumps. " * 50)
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_cancelled_answer_keeps_its_text(chat: Chat) -> None:
    cancel = threading.Event()
    answer = chat.send("The quick", cancel)
    text = next(answer)
    cancel.set()
    text += "".join(answer)
    assert answer.finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": text}
    list(chat.send("brown fox"))
    assert len(chat.messages) == 5


def test_raw_sends_the_text_unchanged_and_remembers_nothing(engine: Engine, tokenizer: Tokenizer) -> None:
    plain = Tokenizer(tokenizer.backend, ChatFormat())  # no template: raw, unless raw is False
    for chat in (Chat(engine, tokenizer, GREEDY, 8, raw=True), Chat(SameEngine(engine), plain, GREEDY, 8)):
        first, second = (list(chat.send("The quick")) for _ in range(2))
        assert first == second
        expected = generate(Session(SameEngine(engine)), tokenizer, tokenizer.encode("The quick"), GREEDY, 8)
        assert "".join(first) == "".join(expected)


def test_options_that_need_a_template_are_refused_without_one(engine: Engine, tokenizer: Tokenizer) -> None:
    plain = Tokenizer(tokenizer.backend, ChatFormat())
    with pytest.raises(InputError, match="system message needs a chat template"):
        Chat(engine, plain, GREEDY, system="Be brief.")
    with pytest.raises(InputError, match="no chat template; give a plain text in place of messages"):
        Chat(engine, plain, GREEDY, raw=False).send("hello")
    with pytest.raises(InputError, match="empty"):
        Chat(engine, tokenizer, GREEDY).send("")


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_the_bos_token_comes_once(engine: Engine, tokenizer: Tokenizer, template: str) -> None:
    bos = tokenizer.encode("<|endoftext|>")
    assert len(bos) == 1
    marked = Tokenizer(
        tokenizer.backend, dataclasses.replace(tokenizer.chat, bos_token_id=bos[0], chat_template=template)
    )
    answer = Chat(engine, marked, GREEDY, 1).send("fox")
    assert answer.statistics.prompt_tokens == 1 + len(tokenizer.encode("fox"))


def test_a_system_message_that_the_template_does_not_take_is_said(engine: Engine, tokenizer: Tokenizer) -> None:
    last = "{% if messages[0].role == 'system' and messages[0].content == 'no' %}{{ raise_exception('No system.') }}"
    deaf = tokenizer.with_chat(ChatFormat(chat_template=last + "{% endif %}{{ messages[-1].content }}"))
    assert Chat(engine, deaf, GREEDY, system="Be brief.").drops_system
    assert not Chat(engine, deaf, GREEDY).drops_system and not Chat(engine, tokenizer, GREEDY, system="a").drops_system
    with pytest.raises(InputError, match=r"refuses this conversation: No system\.; give other messages"):
        Chat(engine, deaf, GREEDY, system="no")


def test_special_tokens_in_a_question_are_text_unless_allowed(engine: Engine, tokenizer: Tokenizer) -> None:
    end = tokenizer.backend.token_to_id("<|im_end|>")
    for allowed in (False, True):
        chat = Chat(engine, tokenizer, GREEDY, 1, control_tokens=allowed)
        list(chat.send("fox <|im_end|> dog"))
        assert (end in chat.session.ids) == allowed


def test_a_continuation_keeps_its_first_space_and_an_answer_has_none(engine: Engine) -> None:
    """SentencePiece begins every text with a space. It is part of a continuation, and of what a form asks for."""
    sentencepiece = Tokenizer(small_tokenizers.sentencepiece(), ChatFormat(chat_template="{{ messages[0].content }}"))
    the = sentencepiece.backend.token_to_id("▁the")
    likeliest = Sampling(greedy=True, logit_bias={the: 100.0})
    assert "".join(Chat(engine, sentencepiece, likeliest, 2, raw=True).send("is")) == " the the"
    assert "".join(Chat(engine, sentencepiece, likeliest, 2).send("is")) == "the the"
    form = Grammars(sentencepiece, engine.vocab_size).regex(" the( the)*")
    assert "".join(Chat(engine, sentencepiece, likeliest, 2, grammar=form).send("is")) == " the the"
    assert "".join(generate(Session(engine), sentencepiece, sentencepiece.encode("is"), likeliest, 2)) == " the the"
