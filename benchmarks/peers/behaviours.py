"""What the tests of llama.cpp's server, vLLM and Ollama expect of a server of OpenAI's API, against a running one.

    merino-edge serve BUNDLE --port 8080
    python benchmarks/peers/behaviours.py http://127.0.0.1:8080

Each behaviour is a request of our own after what a test of theirs checks; its source is named by a letter. Tests of
words, speed, other formats (Anthropic's), images, sound, LoRA, slots and reranking are left out: they are not about
this API, or not about text. Prints what fails, and the share that passes. It needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

URL = (sys.argv[1:] or ["http://127.0.0.1:8080"])[0].rstrip("/")
SOURCES = {
    "L": "llama.cpp, tools/server/tests/unit (b00e4e96 and around)",
    "V": "vLLM, tests/entrypoints/openai (10efe946 and around)",
    "O": "Ollama, openai/*_test.go and middleware (01250de1 and around)",
}
Document = dict[str, Any]
HELLO = [{"role": "user", "content": "What is the best book"}]
BOOK = [{"role": "system", "content": "Book"}, *HELLO]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Ulm", "Bonn"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
FLAT = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]}
CALL["tool_calls"][0]["function"] = {"name": "weather", "arguments": '{"city": "Ulm"}'}  # type: ignore[index]
RESULT = {"role": "tool", "tool_call_id": "a", "content": "It rains."}


class Answer:
    """A status, and a document or the events of a stream."""

    def __init__(self, path: str, body: Any = None, *, headers: Document | None = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                self.status, self.headers, self.text = reply.status, reply.headers, reply.read().decode()
        except urllib.error.HTTPError as error:
            self.status, self.headers, self.text = error.code, error.headers, error.read().decode()

    @property
    def document(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Document]:
        lines = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def choice(self) -> Document:
        return dict(self.document["choices"][0])

    @property
    def refused(self) -> bool:
        return self.status == 400 and bool(self.document["error"]["message"])


def chat(messages: Any = HELLO, **more: Any) -> Answer:
    return Answer("/v1/chat/completions", {"messages": messages, "max_tokens": 6, "temperature": 0, **more})


def text(prompt: Any = "Once upon a time", **more: Any) -> Answer:
    return Answer("/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0, **more})


def response(asked: Any = "Write an example", **more: Any) -> Answer:
    return Answer("/v1/responses", {"input": asked, "max_output_tokens": 24, "temperature": 0, **more})


def form(schema: Any) -> Document:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def streamed(answer: Answer) -> str:
    """The text of a streamed answer."""
    pieces = [choice for event in answer.events for choice in event["choices"]]
    return "".join(piece.get("text") or (piece.get("delta") or {}).get("content") or "" for piece in pieces)


def called(answer: Answer) -> list[Document]:
    return list(answer.choice["message"].get("tool_calls") or [])


def names(answer: Answer) -> list[str]:
    return [event["type"] for event in answer.events]


def vocabulary(words: str) -> list[int]:
    return list(Answer("/tokenize", {"content": words}).document["tokens"])


def tokens_make_text() -> bool:
    choice = chat(logprobs=True).choice
    return "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]


def numbered() -> bool:
    numbers = [event["sequence_number"] for event in response(stream=True).events]
    return numbers == list(range(len(numbers)))


def stop_ids() -> bool:
    first = text(logprobs=0).choice["logprobs"]["tokens"][0]
    ids = vocabulary(first)
    return text(stop_token_ids=ids).choice["finish_reason"] == "stop" if len(ids) == 1 else False


def biased(bias: float) -> bool:
    (token,) = vocabulary(" the")[:1]
    answer = chat(logit_bias={str(token): bias}, max_tokens=4).choice["message"]["content"]
    return ("the the the" in answer) if bias > 0 else " the" not in answer


def seeds() -> bool:
    hot = {"temperature": 1.0, "seed": 42, "max_tokens": 12}
    return text(**hot).choice["text"] == text(**hot).choice["text"] != text(**hot | {"seed": 7}).choice["text"]


def n_streamed() -> bool:
    events = text(n=3, temperature=1.0, seed=42, stream=True).events
    ends = [e["choices"][0]["index"] for e in events if e["choices"] and e["choices"][0]["finish_reason"]]
    return sorted(ends) == [0, 1, 2]


def many_prompts() -> bool:
    several, alone = text(["Hello", "World"]).document["choices"], [text(p).choice["text"] for p in ("Hello", "World")]
    return [choice["index"] for choice in several] == [0, 1] and [choice["text"] for choice in several] == alone


def turn_with_tool() -> bool:
    return chat([*HELLO, CALL, RESULT], tools=[TOOL]).status == 200


def streamed_call() -> bool:
    events = chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True, max_tokens=60).events
    deltas = [d for e in events if e["choices"] for d in e["choices"][0]["delta"].get("tool_calls", [])]
    arguments = "".join(d["function"].get("arguments", "") for d in deltas)
    return deltas[0]["id"] != "" and deltas[0]["function"]["name"] == "weather" and bool(json.loads(arguments))


def role_first() -> bool:
    deltas = [e["choices"][0]["delta"] for e in chat(stream=True).events if e["choices"]]
    return deltas[0].get("role") == "assistant" and not any("role" in delta for delta in deltas[1:])


def one_id() -> bool:
    return len({event["id"] for event in chat(stream=True).events}) == 1


def usage_at_end() -> bool:
    events = text(stream=True, stream_options={"include_usage": True}).events
    return events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 6


def prefill(content: Any) -> bool:
    whole = Answer("/apply-template", {"messages": [*BOOK, {"role": "assistant", "content": content}]}).document
    return str(whole["prompt"]).endswith("Whill")


def round_trip() -> bool:
    ids = vocabulary("What is the capital of France?")
    return Answer("/detokenize", {"tokens": ids}).document["content"] == "What is the capital of France?"


def pieces() -> bool:
    found = Answer("/tokenize", {"content": "Hällo", "with_pieces": True}).document["tokens"]
    data = [bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in found]
    return b"".join(data).decode() == "Hällo"


def lm_eval() -> bool:
    ids = vocabulary("The cat sat on the mat")
    lp = text([ids], echo=True, logprobs=1, max_tokens=1).choice["logprobs"]
    return len(lp["token_logprobs"]) == len(ids) + 1 and lp["token_logprobs"][0] is None


def response_events() -> bool:
    found = names(response(stream=True))
    return found[:2] == ["response.created", "response.in_progress"] and "response.output_text.delta" in found


def response_ids() -> bool:
    found = response().document
    return found["id"].startswith("resp_") and found["output"][0]["id"].startswith("msg_")


def response_turn() -> bool:
    call = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "Ulm"}'}
    result = {"type": "function_call_output", "call_id": "a", "output": "It rains."}
    return response([*HELLO, call, result], tools=[FLAT]).status == 200


def card() -> Document:
    return dict(Answer("/v1/models").document["data"][0])


BEHAVIOURS: list[tuple[str, str, Callable[[], Any]]] = [
    ("L", "/health is 200", lambda: Answer("/health").status == 200),
    ("L", "/models without /v1", lambda: Answer("/models").status == 200),
    ("L", "the model's card has meta.n_ctx_train", lambda: card()["meta"]["n_ctx_train"] > 0),
    ("L", "/props", lambda: Answer("/props").status == 200),
    ("L", "/slots", lambda: Answer("/slots").status in (200, 501)),
    ("L", "/metrics of Prometheus", lambda: "tokens" in Answer("/metrics").text),
    ("L", "/chat/completions without /v1", lambda: Answer("/chat/completions", {"messages": HELLO}).status == 200),
    ("L", "the id has cmpl in it", lambda: "cmpl" in chat().document["id"]),
    ("L", "system_fingerprint", lambda: bool(chat().document["system_fingerprint"])),
    ("L", "usage counts, finish_reason length", lambda: chat().choice["finish_reason"] == "length"),
    (
        "L",
        "content in parts",
        lambda: chat([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]).status == 200,
    ),
    ("L", "the first event has the role, others none", role_first),
    ("L", "all events have one id", one_id),
    ("L", "another model's name is taken", lambda: chat(model="gpt-3.5-turbo-instruct").status == 200),
    ("L", "an assistant's beginning goes on", lambda: prefill("Whill")),
    (
        "L",
        "an assistant's beginning in parts",
        lambda: prefill([{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]),
    ),
    ("L", "/apply-template", lambda: "best book" in Answer("/apply-template", {"messages": BOOK}).document["prompt"]),
    (
        "L",
        "json_object with a schema",
        lambda: (
            json.loads(
                chat(response_format={"type": "json_object", "schema": {"const": "42"}}, max_tokens=9).choice[
                    "message"
                ]["content"]
            )
            == "42"
        ),
    ),
    (
        "L",
        "json_schema with a constant",
        lambda: chat(response_format=form({"const": "foo"}), max_tokens=9).choice["message"]["content"] == '"foo"',
    ),
    ("L", "json_object", lambda: chat(response_format={"type": "json_object"}).choice["message"]["content"][0] == "{"),
    ("L", "another type of form is refused", lambda: chat(response_format={"type": "sound"}).refused),
    (
        "L",
        "a schema that is a number is refused",
        lambda: chat(response_format={"type": "json_object", "schema": 123}).refused,
    ),
    (
        "L",
        "a schema with a wrong type is refused",
        lambda: chat(response_format={"type": "json_object", "schema": {"type": "hiccup"}}).refused,
    ),
    ("L", "json_schema as a field of its own", lambda: chat(json_schema={"const": "42"}).status == 200),
    ("L", "grammar in GBNF", lambda: chat(grammar='root ::= "a"{5,5}').status == 200),
    *[
        ("L", f"messages {value!r} are refused", lambda value=value: chat(value).refused)
        for value in (None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}])
    ],
    (
        "L",
        "two assistants last are refused",
        lambda: chat([*HELLO, *2 * [{"role": "assistant", "content": "x"}]]).refused,
    ),
    (
        "L",
        "timings of a stream",
        lambda: "timings" in chat(stream=True, stream_options={"include_usage": True}).events[-1],
    ),
    ("L", "timings_per_token is taken", lambda: chat(timings_per_token=True).status == 200),
    (
        "L",
        "logprobs of a chat",
        lambda: len(chat(logprobs=True, top_logprobs=10).choice["logprobs"]["content"][0]["top_logprobs"]) == 10,
    ),
    ("L", "logprobs of a chat make its text", tokens_make_text),
    (
        "L",
        "logprobs of a stream",
        lambda: any(e["choices"][0].get("logprobs") for e in chat(logprobs=True, stream=True).events if e["choices"]),
    ),
    ("L", "logit_bias forbids", lambda: biased(-100)),
    ("L", "ignore_eos", lambda: chat(ignore_eos=True, max_tokens=40).document["usage"]["completion_tokens"] == 40),
    ("L", "n answers to a chat", lambda: [c["index"] for c in chat(n=2).document["choices"]] == [0, 1]),
    (
        "L",
        "a prompt beyond the context is refused",
        lambda: chat([{"role": "user", "content": "word " * 40_000}]).refused,
    ),
    ("L", "cached tokens are counted", lambda: chat().document["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0),
    ("L", "a list of two prompts", many_prompts),
    ("L", "a prompt of token ids", lambda: text(vocabulary("Hello")).status == 200),
    ("L", "prompts that mix texts and ids", lambda: text(["Hello", [1, 2]]).status == 200),
    ("L", "seeds repeat and differ", seeds),
    ("L", "/tokenize and /detokenize", round_trip),
    ("L", "/tokenize with pieces", pieces),
    (
        "L",
        "/tokenize with add_special",
        lambda: "tokens" in Answer("/tokenize", {"content": "x", "add_special": True}).document,
    ),
    (
        "L",
        "stop strings end an answer",
        lambda: text(stop=[text().choice["text"][2:4]]).choice["finish_reason"] == "stop",
    ),
    ("L", "cache_prompt is taken", lambda: text(cache_prompt=True).status == 200),
    ("L", "n_probs is taken", lambda: text(n_probs=3).status == 200),
    ("L", "min_p, typical_p, top_k are taken", lambda: text(min_p=0.1, typical_p=0.9, top_k=5).status == 200),
    ("L", "tool_choice required is a call", lambda: called(chat(tools=[TOOL], tool_choice="required", max_tokens=60))),
    ("L", "tool_choice none calls nothing", lambda: not called(chat(tools=[TOOL], tool_choice="none"))),
    (
        "L",
        "a tool without parameters",
        lambda: called(
            chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required", max_tokens=60)
        ),
    ),
    (
        "L",
        "parallel_tool_calls false is one call",
        lambda: len(called(chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=90))) == 1,
    ),
    ("L", "a streamed call in deltas", streamed_call),
    ("L", "a tool's result in the history", turn_with_tool),
    ("L", "/responses without /v1", lambda: Answer("/responses", {"input": "x", "max_output_tokens": 4}).status == 200),
    (
        "L",
        "a response by a schema",
        lambda: (
            json.loads(
                response(text={"format": {"type": "json_schema", "name": "x", "schema": {"const": "foo"}}}).document[
                    "output"
                ][0]["content"][0]["text"]
            )
            == "foo"
        ),
    ),
    ("L", "a response's form text", lambda: response(text={"format": {"type": "text"}}).status == 200),
    (
        "L",
        "a form without a schema is refused",
        lambda: response(text={"format": {"type": "json_schema", "name": "x"}}).refused,
    ),
    ("L", "ids of responses and messages", response_ids),
    ("L", "events of responses", response_events),
    (
        "L",
        "prompt_progress of a stream",
        lambda: any("prompt_progress" in e for e in chat(stream=True, return_progress=True).events),
    ),
    ("L", "embeddings", lambda: Answer("/v1/embeddings", {"input": "x"}).status == 200),
    ("L", "/infill", lambda: Answer("/infill", {"input_prefix": "a", "input_suffix": "b"}).status == 200),
    (
        "L",
        "CORS answers a preflight",
        lambda: bool(Answer("/v1/models", headers={"Origin": "web.site"}).headers.get("Access-Control-Allow-Origin")),
    ),
    ("V", "a completion has id, choices, usage", lambda: text().document["usage"]["total_tokens"] > 6),
    ("V", "logprobs null shows none", lambda: text(logprobs=None).choice["logprobs"] is None),
    ("V", "logprobs 0 shows the tokens'", lambda: len(text(logprobs=0).choice["logprobs"]["top_logprobs"][0]) == 1),
    (
        "V",
        "logprobs 5 shows five or six",
        lambda: 5 <= len(text(logprobs=5).choice["logprobs"]["top_logprobs"][0]) <= 6,
    ),
    ("V", "logprobs 21 is refused", lambda: text(logprobs=21).refused),
    ("V", "logprobs 30 of a stream is refused", lambda: text(logprobs=30, stream=True).refused),
    ("V", "prompt_logprobs", lambda: text(prompt_logprobs=1).status == 200),
    ("V", "prompt_logprobs -1 is refused", lambda: text(prompt_logprobs=-1).refused),
    ("V", "a stream is the whole text", lambda: streamed(text(stream=True)) == text().choice["text"]),
    (
        "V",
        "one finish_reason in a stream",
        lambda: sum(bool(e["choices"][0]["finish_reason"]) for e in text(stream=True).events) == 1,
    ),
    (
        "V",
        "n answers differ by seed",
        lambda: len({c["text"] for c in text(n=3, temperature=1.0, seed=42, max_tokens=20).document["choices"]}) == 3,
    ),
    ("V", "n answers of a stream", n_streamed),
    ("V", "no usage unless asked for", lambda: not any(e.get("usage") for e in text(stream=True).events)),
    ("V", "include_usage at the end", usage_at_end),
    (
        "V",
        "continuous_usage_stats in each event",
        lambda: all(
            e.get("usage")
            for e in text(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}).events
        ),
    ),
    ("V", "stream_options {} is taken", lambda: text(stream=True, stream_options={}).status == 200),
    ("V", "include_usage without a stream is refused", lambda: text(stream_options={"include_usage": True}).refused),
    (
        "V",
        "include_usage null without a stream is refused",
        lambda: text(stream_options={"include_usage": None}).refused,
    ),
    (
        "V",
        "a list of prompts in a stream",
        lambda: {e["choices"][0]["index"] for e in text(["a", "b"], stream=True).events} == {0, 1},
    ),
    ("V", "echo repeats the prompt", lambda: text(echo=True).choice["text"].startswith("Once upon a time")),
    (
        "V",
        "echo with logprobs and max_tokens 0",
        lambda: text(echo=True, logprobs=1, max_tokens=0).choice["logprobs"]["tokens"],
    ),
    ("V", "lm-eval's request", lm_eval),
    ("V", "stop_token_ids", stop_ids),
    ("V", "min_tokens", lambda: text(min_tokens=6).document["usage"]["completion_tokens"] == 6),
    ("V", "logit_bias outside the vocabulary is refused", lambda: chat(logit_bias={"99999999": 1}).refused),
    ("V", "stop_token_ids outside the vocabulary are refused", lambda: chat(stop_token_ids=[99999999]).refused),
    ("V", "an empty list of prompts is refused", lambda: text([]).refused),
    ("V", "an empty prompt is refused", lambda: text("").refused),
    ("V", "ids outside the vocabulary are refused", lambda: text([99999999]).refused),
    ("V", "a body that is no object is refused", lambda: Answer("/v1/chat/completions", [1]).refused),
    ("V", "top_logprobs 21 is refused", lambda: chat(logprobs=True, top_logprobs=21).refused),
    ("V", "top_logprobs without logprobs is refused", lambda: chat(top_logprobs=2).refused),
    (
        "V",
        "top_logprobs 0",
        lambda: chat(logprobs=True, top_logprobs=0).choice["logprobs"]["content"][0]["top_logprobs"] == [],
    ),
    (
        "V",
        "continue_final_message",
        lambda: (
            chat(
                [*HELLO, {"role": "assistant", "content": "The"}],
                continue_final_message=True,
                add_generation_prompt=False,
            ).status
            == 200
        ),
    ),
    (
        "V",
        "continue_final_message with a generation prompt is refused",
        lambda: (
            chat(
                [*HELLO, {"role": "assistant", "content": "The"}],
                continue_final_message=True,
                add_generation_prompt=True,
            ).refused
        ),
    ),
    ("V", "echo of a chat", lambda: chat(echo=True).status == 200),
    ("V", "return_token_ids", lambda: text(return_token_ids=True).status == 200),
    ("V", "truncate_prompt_tokens", lambda: text(truncate_prompt_tokens=4).status == 200),
    ("V", "structured_outputs with a choice", lambda: chat(structured_outputs={"choice": ["a", "b"]}).status == 200),
    (
        "V",
        "a named tool is called",
        lambda: (
            called(
                chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=60)
            )[0]["function"]["name"]
            == "weather"
        ),
    ),
    (
        "V",
        "an unknown named tool is refused",
        lambda: chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}).refused,
    ),
    ("V", "tool_choice without tools is refused", lambda: chat(tool_choice="required").refused),
    ("V", "tool_choice null is taken", lambda: chat(tool_choice=None).status == 200),
    ("V", "tools null are taken", lambda: chat(tools=None).status == 200),
    ("V", "max_completion_tokens", lambda: chat(max_completion_tokens=3).document["usage"]["completion_tokens"] == 3),
    ("V", "an unknown model is 404", lambda: chat(model="large").status == 404),
    ("V", "the model's card has max_model_len", lambda: card()["max_model_len"] > 0),
    ("V", "/tokenize of a prompt", lambda: Answer("/tokenize", {"prompt": "Hello"}).document["count"] > 0),
    ("V", "/tokenize of messages", lambda: Answer("/tokenize", {"messages": HELLO}).document["count"] > 5),
    ("V", "/detokenize gives prompt", lambda: "prompt" in Answer("/detokenize", {"tokens": [1, 2]}).document),
    (
        "V",
        "return_token_strs",
        lambda: Answer("/tokenize", {"prompt": "Hello", "return_token_strs": True}).document["token_strs"],
    ),
    ("V", "/version", lambda: Answer("/version").status == 200),
    (
        "V",
        "x-request-id comes back",
        lambda: Answer("/v1/models", headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc",
    ),
    ("V", "a response", lambda: response().document["object"] == "response"),
    ("V", "a response with instructions", lambda: response(instructions="Be brief.").status == 200),
    (
        "V",
        "a response calls a function",
        lambda: (
            response(tools=[FLAT], tool_choice="required", parallel_tool_calls=False, max_output_tokens=60).document[
                "output"
            ][0]["type"]
            == "function_call"
        ),
    ),
    ("V", "a response goes on after a call", response_turn),
    (
        "V",
        "a response's max_output_tokens is incomplete",
        lambda: response(max_output_tokens=3).document["status"] == "incomplete",
    ),
    (
        "V",
        "previous_response_id that is unknown is refused",
        lambda: response(previous_response_id="resp_x").status in (400, 404),
    ),
    (
        "O",
        "a chat with an image is refused or answered",
        lambda: (
            chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]).status
            in (200, 400)
        ),
    ),
    (
        "O",
        "temperature, top_p, penalties, seed, stop",
        lambda: (
            chat(temperature=0.8, top_p=0.9, frequency_penalty=1.0, presence_penalty=2.0, seed=1, stop=["\n"]).status
            == 200
        ),
    ),
    ("O", "stop as one text", lambda: chat(stop="zzz").status == 200),
    ("O", "json_object as a form", lambda: chat(response_format={"type": "json_object"}).status == 200),
    (
        "O",
        "stream with usage",
        lambda: chat(stream=True, stream_options={"include_usage": True}).events[-1]["usage"]["total_tokens"] > 0,
    ),
    ("O", "assistant with tool_calls and no content", turn_with_tool),
    (
        "O",
        "arguments that are no JSON are refused",
        lambda: (
            chat(
                [
                    *HELLO,
                    {
                        **CALL,
                        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                    },
                    RESULT,
                ]
            ).refused
        ),
    ),
    ("O", "a prompt with a suffix", lambda: text(suffix="end").status == 200),
    ("O", "reasoning_effort is taken", lambda: chat(reasoning_effort="low").status == 200),
    (
        "O",
        "an error has message and type",
        lambda: set(chat("x").document["error"]) >= {"message", "type", "param", "code"},
    ),
    ("O", "one model by its name", lambda: Answer(f"/v1/models/{card()['id']}").document["object"] == "model"),
    ("O", "a developer is the system", lambda: chat([{"role": "developer", "content": "Book"}, *HELLO]).status == 200),
    ("O", "a response's items by easy messages", lambda: response([{"role": "user", "content": "Hi"}]).status == 200),
    (
        "O",
        "a response's items by typed parts",
        lambda: (
            response([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]).status
            == 200
        ),
    ),
    (
        "O",
        "a reasoning item is taken",
        lambda: response([*HELLO, {"type": "reasoning", "id": "r", "summary": []}, *HELLO]).status == 200,
    ),
    (
        "O",
        "a response's text.format json_object",
        lambda: response(text={"format": {"type": "json_object"}}).status == 200,
    ),
    ("O", "the events' numbers go up by one", numbered),
    (
        "O",
        "the stream of a function_call",
        lambda: (
            "response.function_call_arguments.done"
            in names(response(tools=[FLAT], tool_choice="required", stream=True, max_output_tokens=60))
        ),
    ),
]


def main() -> int:
    failed: dict[str, list[str]] = {source: [] for source in SOURCES}
    for source, name, behaves in BEHAVIOURS:
        try:
            passes, why = bool(behaves()), ""
        except Exception as error:  # a document of another form
            passes, why = False, f" ({type(error).__name__}: {str(error)[:80]})"
        if not passes:
            failed[source].append(name + why)
    for source, title in SOURCES.items():
        count = sum(own == source for own, _, _ in BEHAVIOURS)
        print(f"{title}: {count - len(failed[source])} of {count}")
        for name in failed[source]:
            print(f"  fails: {name}")
    passed = len(BEHAVIOURS) - sum(map(len, failed.values()))
    print(f"{passed} of {len(BEHAVIOURS)}, {100 * passed / len(BEHAVIOURS):.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
