"""Tools over HTTP with OpenAI's client: chosen, forced, several, streamed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from helpers.served import CHAT, HELLO, serving
from helpers.tool_users import NOW, WEATHER, hermes_like, mistral_like
from merino_edge import limits
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server.app import Service
from merino_edge.tokenizer import Tokenizer

Clients = dict[str, openai.OpenAI]
ASKED: dict[str, Any] = {"model": "small", "messages": HELLO, "tools": [WEATHER, NOW], "max_tokens": 200, "seed": 1}


@pytest.fixture(scope="module")
def clients(make_bundle: Callable[..., Path], small_model: Any, tokenizer: Tokenizer) -> Iterator[Clients]:
    """Servers of both kinds, whose context holds descriptions of tools."""
    bundle = make_bundle(small_model[1], context=1200)
    engines = [open_engine(bundle, threads=1)[0] for _ in range(2)]
    with (
        closing(engines[0]),
        closing(engines[1]),
        serving(Service(engines[0], hermes_like(tokenizer), "small", waiting=3, key=None)) as hermes,
        serving(Service(engines[1], mistral_like(tokenizer), "small", waiting=3, key=None)) as mistral,
        openai.OpenAI(base_url=f"{hermes}/v1", api_key="none", max_retries=0) as one,
        openai.OpenAI(base_url=f"{mistral}/v1", api_key="none", max_retries=0) as two,
    ):
        yield {"Hermes": one, "Mistral": two}


@pytest.fixture(scope="module")
def client(clients: Clients) -> openai.OpenAI:
    return clients["Hermes"]


def check(call: Any) -> None:
    """A call is one of its function's schema."""
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "now":
        assert arguments == {}
    else:
        assert (
            set(arguments) == {"city", "days"} and arguments["city"] in ("Ulm", "Köln") and 1 <= arguments["days"] <= 9
        )


@pytest.mark.parametrize("kind", ["Hermes", "Mistral"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_answer_is_a_call_of_its_schema(clients: Clients, kind: str, choice: Any) -> None:
    for seed in range(3):
        asked = ASKED | {"tool_choice": choice, "parallel_tool_calls": False, "seed": seed, "temperature": 1.5}
        done = clients[kind].chat.completions.create(**asked).choices[0]
        assert done.finish_reason == "tool_calls" and done.message.content is None
        assert len(done.message.tool_calls) == 1
        check(done.message.tool_calls[0])
        assert isinstance(choice, str) or done.message.tool_calls[0].function.name == "weather"


def test_the_model_chooses_between_text_and_calls(clients: Clients) -> None:
    mistral = clients["Mistral"]
    text = mistral.chat.completions.create(**ASKED | {"max_tokens": 8}, logit_bias={"1": -100}).choices[0]
    assert text.message.content and not text.message.tool_calls and text.finish_reason == "length"
    called = mistral.chat.completions.create(**ASKED, logit_bias={"1": 100}).choices[0]  # [TOOL_CALLS]
    assert called.message.tool_calls and called.finish_reason in ("tool_calls", "length")
    check(called.message.tool_calls[0])


def test_several_calls_come_where_they_may(clients: Clients) -> None:
    comma = {"1": 100, str(_token(clients, ",")): 20}
    asked = ASKED | {"tools": [NOW], "tool_choice": "required", "logit_bias": comma, "max_tokens": 300}
    several = clients["Mistral"].chat.completions.create(**asked).choices[0].message
    assert several.tool_calls and 1 < len(several.tool_calls) <= 16
    assert len({call.id for call in several.tool_calls}) == len(several.tool_calls)
    one = clients["Mistral"].chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message
    assert one.tool_calls and len(one.tool_calls) == 1


def _token(clients: Clients, text: str) -> int:
    url = str(clients["Mistral"].base_url).removesuffix("/v1/")
    return int(httpx.post(f"{url}/tokenize", json={"content": text}).json()["tokens"][0])


@pytest.mark.parametrize("kind", ["Hermes", "Mistral"])
def test_a_streamed_call_is_the_whole_one_in_pieces(clients: Clients, kind: str) -> None:
    asked = ASKED | {"tool_choice": "required", "logprobs": True}
    whole = clients[kind].chat.completions.create(**asked)
    pieces = list(clients[kind].chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    calls: dict[int, dict[str, str]] = {}
    for piece in pieces[:-1]:
        for delta in piece.choices[0].delta.tool_calls or []:
            if delta.id:
                assert delta.index == len(calls) and delta.type == "function" and delta.function.arguments == ""
                calls[delta.index] = {"name": delta.function.name, "arguments": ""}
            calls[delta.index]["arguments"] += delta.function.arguments
    expected = [call.function.model_dump() for call in whole.choices[0].message.tool_calls]
    assert list(calls.values()) == expected
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    tokens = [e.token for p in pieces[:-1] if p.choices[0].logprobs for e in p.choices[0].logprobs.content]
    assert tokens == [entry.token for entry in whole.choices[0].logprobs.content]


def test_a_cut_call_says_so(client: openai.OpenAI) -> None:
    cut = client.chat.completions.create(**ASKED | {"tool_choice": "required", "max_tokens": 30}).choices[0]
    assert cut.finish_reason == "length"
    asked = {"tools": [WEATHER], "tool_choice": "required", "stop": ["city"]}
    stopped = client.chat.completions.create(**ASKED | asked).choices[0]
    assert stopped.finish_reason == "length" and stopped.message.tool_calls[0].function.arguments == '{"'


def test_the_turn_after_a_call_works(client: openai.OpenAI) -> None:
    asked = ASKED | {"tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**asked).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "it rains"}
    again = client.chat.completions.create(**ASKED | {"messages": [*HELLO, message, result], "max_tokens": 5})
    assert again.usage.prompt_tokens > 50


def test_none_hides_the_tools(client: openai.OpenAI) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "tools"} | {"max_tokens": 5}
    plain = client.chat.completions.create(**asked)
    hidden = client.chat.completions.create(**asked, tools=ASKED["tools"], tool_choice="none")
    assert hidden.choices[0].message == plain.choices[0].message
    assert hidden.usage.prompt_tokens == plain.usage.prompt_tokens


TALK = [*HELLO, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "now", "arguments": "{}"}}]}]


def with_parameters(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"tools": [NOW, NOW]}, "tools.1.function.name", "a second tool"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [NOW] * (limits.MAX_TOOLS + 1)}, "tools", "128"),
        (with_parameters({"type": "string"}), "tools.0.function.parameters", "no object"),
        (with_parameters({"description": "x" * 10**6}), "tools", "characters"),
        (with_parameters({"properties": {"a": {"type": "wings"}}}), "tools", "cannot be used"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice", "no tool 'fly'"),
        ({"tool_choice": "perhaps"}, "tool_choice", "auto"),
        ({"regex": "a"}, "regex", "not with tools"),
        ({"messages": [*TALK, {"role": "tool", "tool_call_id": "b", "content": "x"}]}, "messages.2.tool_call_id", "id"),
        ({"messages": [*TALK, {"role": "tool", "content": "x"}]}, "messages.2.tool_call_id", "missing"),
        (
            {"messages": [*TALK, {"role": "tool", "tool_call_id": "a", "content": {"t": 1}}]},
            "messages.2.content",
            "string",
        ),
        ({"messages": [*TALK, {"role": "tool", "tool_call_id": "a"}]}, "messages.2.content", "required"),
        (
            {"messages": [{**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, *HELLO]},
            "messages.0.tool_calls.0.function.arguments",
            "no JSON object",
        ),
        (
            {"messages": [{**HELLO[0], "tool_calls": TALK[1]["tool_calls"]}]},
            "messages.0.tool_calls",
            "only an assistant",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], field: str, words: str
) -> None:
    answer = httpx.post(str(client.base_url).removesuffix("/v1/") + CHAT, json=ASKED | change)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"].startswith(field) and words in error["message"] and error["code"] == "invalid_value", error
