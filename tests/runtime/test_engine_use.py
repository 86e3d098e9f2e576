"""One session at a time: others raise, and answers that cannot go on raise in place of garbage."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from helpers.same_engine import SameEngine
from merino_edge.errors import EngineInUseError, InputError
from merino_edge.runtime.chat import Chat
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

GREEDY = Sampling(greedy=True)
OTHERS = "belongs to another session"


@pytest.fixture(name="engine")
def own_engine(engine: Engine) -> SameEngine:
    """An engine that no other test has had: a failed test keeps its session alive."""
    return SameEngine(engine)


def test_a_second_chat_is_refused_until_the_first_is_closed(engine: Engine, tokenizer: Tokenizer) -> None:
    first, second = Chat(engine, tokenizer, GREEDY, 8), Chat(engine, tokenizer, GREEDY, 8)
    text = "".join(first.send("The quick"))
    with pytest.raises(EngineInUseError, match=OTHERS):
        second.send("brown fox")
    assert second.messages == []
    first.close()
    assert "".join(second.send("The quick")) == text
    with pytest.raises(EngineInUseError, match=OTHERS):
        first.send("brown fox")
    second.close()
    again = "".join(first.send("brown fox"))
    alone = Chat(SameEngine(engine), tokenizer, GREEDY, 8)
    "".join(alone.send("The quick"))
    assert "".join(alone.send("brown fox")) == again and alone.messages == first.messages


def test_sessions_that_nobody_has_any_more_keep_nothing(engine: Engine, tokenizer: Tokenizer) -> None:
    ended = generate(Session(engine), tokenizer, [1, 2, 3], GREEDY, 4)
    list(ended)
    begun = generate(Session(engine), tokenizer, [1, 2, 3], GREEDY, 4)
    next(begun)
    with pytest.raises(EngineInUseError, match=OTHERS):
        Session(engine).prefill([1])
    begun.close()
    session = Session(engine)
    session.prefill([1])
    circle = [session]
    circle.append(circle)  # type: ignore[arg-type]
    del session, circle
    Session(engine).prefill([1])


def test_an_older_answer_does_not_go_on_after_a_newer_one(engine: Engine, tokenizer: Tokenizer) -> None:
    session = Session(engine)
    older = generate(session, tokenizer, [1, 2, 3], GREEDY, 20)
    next(older)
    newer = generate(session, tokenizer, [4, 5], GREEDY, 8)
    list(newer)
    with pytest.raises(EngineInUseError, match="a newer answer has begun"):
        next(older)
    fresh = generate(Session(SameEngine(engine)), tokenizer, [4, 5], GREEDY, 8)
    list(fresh)
    assert fresh.tokens == newer.tokens


def test_two_threads_in_one_session_are_refused(engine: Engine) -> None:
    session, errors = Session(engine), list[BaseException]()

    def second() -> None:
        try:
            session.prefill([1])
        except EngineInUseError as error:
            errors.append(error)

    with session.use:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another thread" in str(errors[0]) and session.ids == []
    session.prefill([1])


def test_prompts_are_ids_of_any_kind_and_a_stop_text_is_one(engine: Engine, tokenizer: Tokenizer) -> None:
    def answer(prompt: object, stop: object = ()) -> str:
        return "".join(generate(Session(engine), tokenizer, prompt, GREEDY, 8, stop=stop))  # type: ignore[arg-type]

    expected = answer([1, 2, 3])
    assert answer(np.array([1, 2, 3])) == answer((1, 2, 3)) == expected
    assert answer([1, 2, 3], stop=expected[1:3]) == expected[: expected.index(expected[1:3])]
    for wrong in ("text", [1.0], [True], None):
        with pytest.raises(InputError, match=r"tokenizer\.encode"):
            answer(wrong)


def test_contents_may_be_none_or_parts(engine: Engine, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "quick"}]
    whole, empty = ([{"role": "user", "content": content}] for content in ("The quick", ""))
    assert tokenizer.encode_chat([{"role": "user", "content": parts}]) == tokenizer.encode_chat(whole)
    assert tokenizer.encode_chat([{"role": "user", "content": None}]) == tokenizer.encode_chat(empty)
    chat = Chat(engine, tokenizer, GREEDY, 2)
    chat.send(parts)
    assert chat.messages[0]["content"] == "The quick"
    image = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    for wrong in ({"role": "user", "content": image}, {"role": "user", "content": 3}, {"content": "a"}, "a"):
        with pytest.raises(InputError, match=r"message 0|the model reads text only"):
            tokenizer.encode_chat([wrong])  # type: ignore[list-item]


def test_a_chat_goes_on_with_another_conversation(engine: Engine, tokenizer: Tokenizer) -> None:
    chat = Chat(engine, tokenizer, GREEDY, 8, system="Be brief.")
    "".join(chat.send("The quick"))
    kept = chat.messages
    text = "".join(chat.send("brown fox"))
    chat.close()
    other = Chat(engine, tokenizer, GREEDY, 8)
    other.resume(kept)
    assert other.messages == kept
    assert "".join(other.send("brown fox")) == text
    other.reset()
    assert other.messages == kept[:1]
    for wrong in (kept[:2], kept[1:2], [*kept, kept[0]]):
        with pytest.raises(InputError, match="questions and answers in turns"):
            other.resume(wrong)
    assert other.messages == kept[:1]
