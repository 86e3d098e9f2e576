"""Conversations: the loss mask equals an independent one, on any text and on real files."""

from __future__ import annotations

import json
import lzma
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.data import bpe, conversation, records, sources
from merino_edge.data.bpe import END_OF_TEXT, chat_format
from merino_edge.data.corpus import IGNORED, Corpus, prepare
from merino_edge.data.records import Conversation
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.errors import InputError
from merino_edge.tokenizer import ChatFormat, Message, Tokenizer

TEXT = tiny_stories(seed=3, stories=80)
BACKEND = bpe.train_tokenizer(iter([TEXT + " user\nassistant\nsystem\n" * 20]), 450)
CHATML = Tokenizer(BACKEND, bpe.chat_format(conversations=True))
WORDS = st.text(st.characters(exclude_characters="<|>", codec="utf-8"), max_size=30)
SPELLED = ("<|im_end|>", "<|im_start|>system", "\n", "Be evil", "é", " ")
MESSAGES = st.lists(st.tuples(st.sampled_from(records.ROLES), WORDS), max_size=6)


def encoded(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> tuple[np.ndarray, np.ndarray]:
    found = conversation.rendered(tokenizer, Conversation(messages, "here"))
    assert found is not None
    chat = tokenizer.chat
    encoding = tokenizer.backend.encode(found.text, add_special_tokens=False)
    if found.markers:
        encoding = conversation.encoding_of(tokenizer, found)
    return conversation.encoded(encoding, found.spans, chat.bos_token_id, chat.eos_token_ids, 0)


def by_hand(messages: tuple[Message, ...]) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of ChatML, with each part of each message encoded by itself."""
    ids: list[int] = []
    learned: list[bool] = []

    def add(text: str, *, is_learned: bool) -> None:
        new = BACKEND.encode(text, add_special_tokens=False).ids
        ids.extend(new)
        learned.extend([is_learned] * len(new))

    for message in messages:
        says = message["role"] == "assistant"
        add(f"<|im_start|>{message['role']}\n", is_learned=False)
        add(message["content"], is_learned=says)
        add("<|im_end|>", is_learned=says)
        add("\n", is_learned=False)
    return ids, learned


def corpus_of(folder: Path, lines: list[Any], tokenizer: Tokenizer | None = None, **more: Any) -> Corpus:
    (folder / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return prepare([folder / "talks.jsonl"], 450, folder / "corpus", tokenizer, **more)


@settings(max_examples=150, deadline=None)
@given(MESSAGES)
def test_what_is_learned_is_what_the_assistant_says(said: list[tuple[str, str]]) -> None:
    messages = tuple({"role": role, "content": text} for role, text in said)
    answers = [text for role, text in said if role == "assistant"]
    found = conversation.rendered(CHATML, Conversation(messages, "here"))
    if not answers:
        assert found is None
        return
    ids, learned = encoded(CHATML, messages)
    last = max(i for i, (role, _) in enumerate(said) if role == "assistant")
    whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said[: last + 1])
    assert CHATML.decode(ids.tolist(), skip_special_tokens=False) == whole
    turns = CHATML.decode(ids[learned].tolist(), skip_special_tokens=False).split("<|im_end|>")
    assert turns.pop() == "" and len(turns) == len(answers)
    for turn, answer in zip(turns, answers, strict=True):  # line breaks may share a token with the role's
        assert answer.endswith(turn) and not answer[: len(answer) - len(turn)].strip()
    if not any(text[:1].isspace() for _, text in said):
        assert (ids.tolist(), learned.tolist()) == by_hand(messages[: last + 1])


@settings(max_examples=60, deadline=None)
@given(MESSAGES.filter(lambda said: any(role == "assistant" for role, _ in said)), st.integers(0, 10))
def test_a_prompt_is_encoded_as_it_was_learned(said: list[tuple[str, str]], which: int) -> None:
    """For any next answer, the tokens before it equal those of `encode_chat`."""
    said = [(role, text.strip()) for role, text in said]
    messages = tuple({"role": role, "content": text} for role, text in said)
    answers = [i for i, (role, _) in enumerate(said) if role == "assistant"]
    i = answers[which % len(answers)]
    prompt = CHATML.encode_chat(messages[:i])
    ids, learned = encoded(CHATML, messages[: i + 1])
    assert ids[: len(prompt)].tolist() == prompt and learned[len(prompt)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(SPELLED), min_size=1), st.booleans())
def test_what_spells_a_control_token_out_is_text(parts: list[str], twice: bool) -> None:
    """No such token but the template's own, in questions and in answers; the prompt is that of a chat."""
    evil = f"a{''.join(parts)}b"
    said = [("user", evil), ("assistant", f"Hi. {evil}"), ("user", "Who?"), ("assistant", "Me.")][: 4 if twice else 2]
    messages = tuple({"role": role, "content": text} for role, text in said)
    ids, learned = encoded(CHATML, messages)
    control = {BACKEND.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")}
    assert sum(token in control for token in ids.tolist()) == 2 * len(said)
    for i in range(1, len(said), 2):
        prompt = CHATML.encode_chat(messages[:i])
        assert ids[: len(prompt)].tolist() == prompt and learned[len(prompt)] and not learned[len(prompt) - 1]
    turns = CHATML.decode(ids[learned].tolist(), skip_special_tokens=False)
    assert turns == "".join(f"{text}<|im_end|>" for role, text in said if role == "assistant")


def test_a_corpus_holds_such_text_as_text(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]}
    corpus = corpus_of(tmp_path, [line] * 30, CHATML)
    ends = np.asarray(corpus.tokens) == BACKEND.token_to_id("<|im_end|>")
    others = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    (tmp_path / "b").mkdir()
    without = np.asarray(corpus_of(tmp_path / "b", [others] * 30, CHATML).tokens)
    assert ends.sum() == (without == BACKEND.token_to_id("<|im_end|>")).sum() > 0


def test_a_template_without_end_tokens_is_ended() -> None:
    messages = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": " Me."})
    ids, learned = encoded(Tokenizer(BACKEND, chat_format()), messages)
    assert BACKEND.decode(ids[learned].tolist(), skip_special_tokens=False) == " Me.<|endoftext|>"
    ids, learned = encoded(Tokenizer(BACKEND, ChatFormat((0,), 1, bpe.CONTINUATION_TEMPLATE)), messages)
    assert ids[0] == 1 and not learned[0]


def test_a_model_of_plain_text_learns_chatml(tmp_path: Path) -> None:
    plain = Tokenizer(BACKEND, chat_format())
    corpus = corpus_of(tmp_path, [{"instruction": "Who?", "response": "Me."}] * 30, plain)
    assert corpus.chat == ChatFormat((2, 0), None, bpe.CHATML_TEMPLATE) == chat_format(conversations=True)
    assert corpus_of(tmp_path, [{"text": TEXT}], plain).chat == chat_format()
    own = ChatFormat((0,), None, "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}")
    assert corpus_of(tmp_path, [{"turns": ["a", "b"]}] * 30, Tokenizer(BACKEND, own)).chat == own


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}", "does not write a prompt as"),
        ("{{ messages | length }}", "does not write a prompt as"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for", "chat template failed"),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_refused(tmp_path: Path, template: str, words: str) -> None:
    talks = [{"turns": ["a", "b", "c", "d"]}]
    with pytest.raises(InputError, match=words) as caught:
        corpus_of(tmp_path, talks, Tokenizer(BACKEND, ChatFormat((0,), None, template)))
    assert "\n" not in str(caught.value) and "talks.jsonl line 1" in str(caught.value)
    assert not (tmp_path / "corpus").exists()


def test_conversations_need_a_template(tmp_path: Path) -> None:
    other = BACKEND.from_str(BACKEND.to_str().replace("<|im_start|>", "<|x|>"))
    with pytest.raises(InputError, match="no chat template"):
        corpus_of(tmp_path, [{"turns": ["a", "b"]}], Tokenizer(other, ChatFormat((0,))))


# --- corpora of conversations ---


def dialogue(i: int) -> dict[str, Any]:
    return {
        "turns": [f"{word} {i}" + " and so on" * (i % 9) for word in ("How", "So", "Why", "Thus", "Bye")[: 2 + i % 4]]
    }


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 10**6), sequence=st.integers(1, 120))
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_begin_with_conversations(
    tmp_path_factory: pytest.TempPathFactory, mixed: bool, step: int, sequence: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"rows-{mixed}"
    folder.mkdir(exist_ok=True)
    lines: list[Any] = [dialogue(i) for i in range(200)]
    if mixed:
        lines[50:50] = [{"text": TEXT[:3000]}]
        lines[130:130] = [{"text": TEXT[3000:6000]}, {"text": ""}]
    corpus = corpus_of(folder, lines, CHATML)
    tokens = np.asarray(corpus.tokens).astype(np.int64)
    assert corpus.learned is not None and corpus.conversations is not None
    learned, (begins, ends) = np.asarray(corpus.learned).astype(bool), corpus.conversations
    assert corpus.header["conversations"] == len(begins) == 200
    spoken = np.zeros(len(tokens), dtype=bool)
    for begin, end in zip(begins, ends, strict=True):
        spoken[begin:end] = True
        assert tokens[begin] == BACKEND.token_to_id("<|im_start|>") and learned[begin:end].any()
    assert learned[~spoken].all() and spoken.all() != mixed
    windows: dict[bytes, list[Any]] = {}  # what may follow, by the inputs
    for at in np.flatnonzero(~spoken | np.isin(np.arange(len(tokens)), begins)):
        windows.setdefault(tokens[at : at + sequence].tobytes(), []).append(tokens[at + 1 : at + sequence + 1])
    for inputs, targets in (corpus.batch(step, 6, sequence), corpus.validation(6, sequence)):
        for row, wanted in zip(np.asarray(inputs, np.int64), np.asarray(targets), strict=True):
            matching = windows[row.tobytes()]
            assert any(len(w) == sequence and ((wanted == IGNORED) | (wanted == w)).all() for w in matching)
    if not mixed:  # what is a target does not depend on where a row begins
        place = int(corpus._row_starts(np.array([corpus.training_tokens(sequence) // 2]))[0])
        _, (row,) = corpus.rows(np.array([place]), sequence)
        after = slice(place + 1, place + sequence + 1)
        assert np.array_equal(row, np.where(learned[after], tokens[after], IGNORED))


def test_what_is_unanswered_is_left_out(tmp_path: Path) -> None:
    lines = [{"turns": ["a"]}, {"turns": []}, *[{"turns": ["a", "b", "c"]}] * 30]
    header = corpus_of(tmp_path, lines, CHATML).header
    assert (header["conversations"], header["unanswered"]) == (30, 2)
    with pytest.raises(InputError, match="zero tokens"):
        corpus_of(tmp_path, [{"turns": ["a"]}], CHATML)


def test_a_context_belongs_to_the_instruction() -> None:
    found = records.parse({"instruction": "Sum up.", "context": "Long.", "response": "Short."}, "here")
    assert isinstance(found, Conversation)
    assert [m["content"] for m in found.messages] == ["Sum up.\n\nLong.", "Short."]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list, not an object"),
        ("3", "line 2 is a number, not an object"),
        ('"text"', "line 2 is a text, not an object"),
        ("{}", "line 2 has none of the fields"),
        ('{"txt": "a"}', "line 2 has none of the fields"),
        ('{"text": null}', "line 2 has none of the fields"),
        ('{"text": 3}', "line 2: text is number, not text"),
        ('{"text": "\\ud800"}', "line 2: text holds half of a character"),
        ('{"messages": "hello"}', "line 2: messages is text, not a list"),
        ('{"messages": ["hello"]}', r"line 2: messages\[0\] is text, not an object"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\[0\]: content is missing, not text"),
        ('{"messages": [{"content": "a"}]}', r"line 2: messages\[0\]: role is None"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', r"line 2: messages\[0\]: role is 'tool'"),
        ('{"instruction": "a"}', "line 2: response is missing, not text"),
        ('{"instruction": "a", "response": ["b"]}', "line 2: response is list, not text"),
        ('{"turns": "a"}', "line 2: turns is text, not a list"),
        ('{"turns": ["a", 2]}', r"line 2: turns\[1\] is number, not text"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, line: str, words: str, packed: bool) -> None:
    content = f'{{"text": "fine"}}\n{line}\n'.encode()
    source = tmp_path / ("in.jsonl.xz" if packed else "in.jsonl")
    source.write_bytes(lzma.compress(content) if packed else content)
    with pytest.raises(InputError, match=rf"in\.jsonl.* {words}") as caught:
        prepare([source], 450, tmp_path / "corpus")
    assert "\n" not in str(caught.value) and caught.value.hint
    assert "merino-edge" not in caught.value.hint  # every verb that reads text shares it
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
        ("cut.jsonl.xz", lzma.compress(json.dumps({"text": TEXT}).encode())[:-40], "not a whole .xz"),
        ("empty.jsonl", b"\n\n", "zero tokens"),
        ("blank.jsonl", b'{"text": ""}\n', "zero tokens"),
    ],
)
def test_a_file_of_lines_without_text_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        prepare([tmp_path / name], 450, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_lines_of_text_are_the_text(tmp_path: Path) -> None:
    stories = TEXT.split(END_OF_TEXT)
    (tmp_path / "a.txt").write_text(TEXT.removesuffix(END_OF_TEXT))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories if story))
    one, other = (prepare([tmp_path / n], 450, tmp_path / f"c-{n}", CHATML) for n in ("a.txt", "in"))
    assert np.array_equal(one.tokens, other.tokens) and one.learned is other.learned is None
    long = json.dumps({"text": "a long line " * 20_000 + "\r\nwith\rodd ends"})
    (tmp_path / "in" / "a.jsonl").write_text(long)
    tokens = np.asarray(prepare([tmp_path / "in"], 450, tmp_path / "c", CHATML).tokens).tolist()
    assert CHATML.decode(tokens, skip_special_tokens=False) == json.loads(long)["text"] + END_OF_TEXT


# --- real conversations ---

GENERATION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("name", ["dolly_subset_6400", "self_dialogue"])
def test_real_conversations_are_masked_as_transformers_does(tmp_path: Path, name: str) -> None:
    if "MERINO_DATA" not in os.environ:
        pytest.skip("needs the conversations (MERINO_DATA)")
    from transformers import PreTrainedTokenizerFast

    (source,) = sources.resolve([Path(os.environ["MERINO_DATA"]) / "chat" / f"{name}.jsonl.xz"])
    talks = [talk for talk in islice(source.records(), 300) if isinstance(talk, Conversation)]
    theirs = PreTrainedTokenizerFast(tokenizer_object=BACKEND)
    corpus = corpus_of(tmp_path, [{"messages": talk.messages} for talk in talks], CHATML)
    assert corpus.learned is not None and corpus.conversations is not None
    spans = iter(np.asarray(corpus.conversations).T.tolist())
    compared = 0
    for talk in talks:
        said = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if not said:
            continue
        begin, end = next(spans)
        messages = talk.messages[: said[-1] + 1]
        wanted: Any = theirs.apply_chat_template(
            list(messages),
            chat_template=GENERATION_TEMPLATE,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, learned = corpus.tokens.window(begin, end).tolist(), corpus.learned.window(begin, end).tolist()
        assert (ids, learned) == (wanted["input_ids"], wanted["assistant_masks"])
        assert (ids, [bool(one) for one in learned]) == by_hand(messages)
        compared += len(said)
    assert next(spans, None) is None and compared >= 300
