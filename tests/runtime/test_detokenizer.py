"""The streamed pieces, joined, are the decoded text cut before the first stop string, for any tokens."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from helpers import small_tokenizers
from merino_edge.errors import InputError
from merino_edge.runtime.detokenizer import StreamingDetokenizer
from merino_edge.tokenizer import ChatFormat, Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = len(BYTES)  # the id of "<end>"


def byte_level() -> Tokenizer:
    """One token per byte, so that each character can be split in each way of a byte-level tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, ChatFormat())


def byte_fallback() -> Tokenizer:
    """As in sentencepiece models: words with a leading mark, and bytes for characters outside the words."""
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(["▁", "a", "b", "▁a", "ab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, ChatFormat())


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
CONTINUED = {name: Tokenizer(make(), ChatFormat()) for name, make in small_tokenizers.KINDS.items()}
WORDS = st.text(st.sampled_from("ab é€🦊👩‍🚀\n"), max_size=20)


def stream(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), prompt: tuple[int, ...] = ()
) -> tuple[list[str], StreamingDetokenizer]:
    text = StreamingDetokenizer(tokenizer, stop, prompt)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, text
    return [*pieces, text.finish()], text


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, SPECIAL), max_size=40))
def test_any_bytes_join_to_the_decoded_whole(ids: list[int]) -> None:
    pieces, text = stream(TOKENIZERS["byte level"], ids)
    assert "".join(pieces) == text.text == TOKENIZERS["byte level"].decode(ids)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(TOKENIZERS)), text=WORDS)
def test_no_piece_holds_half_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The rule: as soon as the text so far ends with a stop string, it is cut before that string."""
    for end in range(1, len(text) + 1):
        if matches := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, matches))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    text=st.text(st.sampled_from("ab🦊"), max_size=20),
    stop=st.lists(st.text(st.sampled_from("ab🦊"), min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_stop_strings_cut_where_they_begin(kind: str, text: str, stop: tuple[str, ...]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    pieces, result = stream(tokenizer, ids, stop)
    assert "".join(pieces) == result.text == cut(whole, stop)
    assert result.stopped == any(s in whole for s in stop)


def test_certain_text_is_returned_at_once() -> None:
    text = StreamingDetokenizer(TOKENIZERS["byte level"], ["xyz"])
    ids = TOKENIZERS["byte level"].encode("axyb é")
    assert [text.push(token) for token in ids] == ["a", "", "", "xyb", " ", "", "é"]


def test_bad_stop_strings_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        StreamingDetokenizer(TOKENIZERS["byte level"], [""])
    with pytest.raises(InputError, match="limit"):
        StreamingDetokenizer(TOKENIZERS["byte level"], ["x"] * 65)


@pytest.mark.parametrize("kind", list(small_tokenizers.KINDS))
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("the <fox é🦊\n"), max_size=20), share=st.floats(0, 1))
def test_a_continuation_is_the_text_that_follows(kind: str, text: str, share: float) -> None:
    """With the first space, which a decoder of SentencePiece leaves out of a text of its own."""
    tokenizer = CONTINUED[kind]
    ids = tokenizer.encode(f"{text} the fox")
    prompt, rest = ids[: int(share * len(ids))], ids[int(share * len(ids)) :]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
    if not before or not whole.startswith(before) or "\ufffd" in before + whole:  # it ends within a character
        return
    pieces, _ = stream(tokenizer, rest, prompt=tuple(prompt))
    assert before + "".join(pieces) == whole == before + tokenizer.decode_after(prompt, rest)


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_a_text_of_its_own_has_no_first_space(kind: str) -> None:
    tokenizer = CONTINUED[kind]
    ids = tokenizer.encode("the the")
    prompts = [(), (tokenizer.backend.token_to_id("<s>"),)]  # nothing, or nothing with a text
    assert ["".join(stream(tokenizer, ids, prompt=prompt)[0]) for prompt in prompts] == ["the the"] * 2
    special = [*tokenizer.encode("t"), *[tokenizer.backend.token_to_id("</s>")] * 9]
    assert "".join(stream(tokenizer, ids, prompt=tuple(special))[0]) == " the the"


@pytest.mark.parametrize("kind", list(small_tokenizers.KINDS))
def test_tokens_without_text_are_not_decoded_again_and_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may write one control token, or half a character, thousands of times."""
    tokenizer = CONTINUED[kind]
    decoded, decode = [0], tokenizer.decode

    def counted(ids: list[int], **options: bool) -> str:
        decoded[0] += len(ids)
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    end, half = tokenizer.backend.token_to_id("<|im_end|>"), tokenizer.backend.token_to_id("<0xE6>")
    for tokens in ([end] * 400, [half] * 400 if half is not None else []):
        decoded[0] = 0
        the = tokenizer.encode("the")
        pieces, _ = stream(tokenizer, [*the, *tokens, *the])
        assert decoded[0] < 100 * (len(tokens) + 10)
        assert "".join(pieces) == decode([*the, *tokens, *the])
