"""/v1/responses with OpenAI's client: texts, tools, forms, streams, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from helpers.served import serving
from helpers.tool_users import WEATHER, mistral_like
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.server.app import Service
from merino_edge.tokenizer import Tokenizer

FLAT = {"type": "function", **WEATHER["function"]}
ASKED: dict[str, Any] = {"model": "small", "input": "The quick brown", "temperature": 0, "max_output_tokens": 12}
CALL = {"1": 100}  # the token [TOOL_CALLS]


@pytest.fixture(scope="module")
def client(make_bundle: Callable[..., Path], small_model: Any, tokenizer: Tokenizer) -> Iterator[openai.OpenAI]:
    engine, _, _ = open_engine(make_bundle(small_model[1], context=1200), threads=1)
    with (
        closing(engine),
        serving(Service(engine, mistral_like(tokenizer), "small", waiting=1, key=None)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


def names(events: list[Any]) -> list[str]:
    """The events' names, without repetitions in a row."""
    found = [event.type for event in events]
    return [name for i, name in enumerate(found) if i == 0 or name != found[i - 1]]


def test_a_text_is_that_of_a_chat(client: openai.OpenAI) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown"}]
    chat = client.chat.completions.create(model="small", messages=talk, temperature=0, max_tokens=12)
    done = client.responses.create(**ASKED, instructions="Be brief.")
    assert done.output_text == chat.choices[0].message.content
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert done.usage.input_tokens == chat.usage.prompt_tokens and done.usage.output_tokens == 12
    assert done.model == "small" and done.output[0].status == "incomplete"
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "The quick brown"}]}]
    for more in (parts, [{"type": "message", **parts[0]}]):
        assert (
            client.responses.create(**ASKED | {"input": more}, instructions="Be brief.").output_text == done.output_text
        )


def test_a_streamed_text_has_its_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert names(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    with client.responses.stream(**ASKED) as helper:  # puts the snapshot together and checks it
        for _ in helper:
            pass


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results(client: openai.OpenAI, stream: bool) -> None:
    asked = ASKED | {"tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    if stream:
        events = list(client.responses.create(**asked, stream=True))
        assert names(events) == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        done = events[-1].response
        deltas = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        assert deltas == done.output[0].arguments
    else:
        done = client.responses.create(**asked)
    (call,) = done.output
    assert (call.type, call.name, call.status, done.status) == ("function_call", "weather", "completed", "completed")
    assert set(json.loads(call.arguments)) == {"city", "days"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "it rains"}
    history = [{"role": "user", "content": "The quick brown"}, *done.output, result]
    again = client.responses.create(**ASKED | {"input": history}, tools=[FLAT])
    assert again.usage.input_tokens > done.usage.input_tokens and again.output_text


def test_an_answer_follows_its_form(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    done = client.responses.create(**ASKED | {"max_output_tokens": 50}, text={"format": form})
    assert set(json.loads(done.output_text)) == {"a"} and done.text.format.schema_ == schema


def test_logprobs_come_with_the_text(client: openai.OpenAI) -> None:
    asked = ASKED | {"top_logprobs": 2, "include": ["message.output_text.logprobs", "reasoning.encrypted_content"]}
    done = client.responses.create(**asked).output[0].content[0]
    assert len(done.logprobs) == 12 and all(len(entry.top_logprobs) == 2 for entry in done.logprobs)
    events = list(client.responses.create(**asked, stream=True))
    streamed = [entry.logprob for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
    assert streamed == [entry.logprob for entry in done.logprobs][: len(streamed)] and streamed


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "messages.0.tool_call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"wings": 1}, "wings"),
        ({"temperature": 1e9}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": ["message"]}]}, "input.0.type"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], field: str) -> None:
    answer = httpx.post(f"{client.base_url}responses", json=ASKED | change)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith(field) and error["code"], error


def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI) -> None:
    nothing = {"store": False, "background": False, "previous_response_id": None, "reasoning": {"effort": "low"}}
    nothing |= {"include": [], "metadata": {"a": "b"}, "truncation": "disabled", "user": "me", "service_tier": "auto"}
    done = client.responses.create(**ASKED, **nothing)
    assert done.output_text == client.responses.create(**ASKED).output_text and done.metadata == {"a": "b"}


def test_a_failing_stream_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:  # before it begins
        client.responses.create(**ASKED | {"input": "x " * 5000}, stream=True)
    assert refused.value.code == "context_length_exceeded"
