"""What a board reads: bundles, engines, prompt caches, grammars, requests to the server, evaluation sets."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from fuzz.draft import BYTES, HEADED, Codec, Draft, Files, Loader, record, sign_file, text
from fuzz.graph_form import GRAPH
from fuzz.honest import HELLO, PROMPT, TINY, content, tokenizer_json, weights, written
from fuzz.json_changes import canonical, encode, put, sha256, sign, step
from fuzz.loaders.designs import show
from fuzz.loaders.trainings import PACKED, kept
from fuzz.tokenizer_form import TOKENIZER

from helpers.evaluation_sets import write_sets
from merino_edge import artefact, bundle, engine_store
from merino_edge.cli.console import stderr
from merino_edge.cli.demo_steps import KIND as DEMO_KIND
from merino_edge.cli.demo_steps import STATE, Steps
from merino_edge.data.bpe import chat_format
from merino_edge.errors import InputError, MerinoError
from merino_edge.export.graph import build_model, save
from merino_edge.runtime import prompt_cache
from merino_edge.runtime.evaluation.tasks import MERINO14
from merino_edge.runtime.generation import generate
from merino_edge.runtime.grammar import Grammar, Grammars
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.server.app import Service
from merino_edge.runtime.session import Session

# --- bundles and engines ---------------------------------------------------------------------------


def _write_bundle(folder: Path, context: int = 128) -> None:
    a = replace(TINY, max_positions=max(context, TINY.max_positions))
    save(build_model(a, weights(TINY), "fp32", context), folder / "model.onnx")
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "chat.json").write_text(chat_format(conversations=True).to_json())
    more = {"contexts": [context], "graph": {"opset": 21, "lowering": "ort"}, "engines": [],
            "tunings": [{"cpu": "x", "cores": 4, "threads": 2, "spinning": True}],
            "parity": [{"check": "logits", "value": 1e-6, "limit": 1e-3, "passed": True}]}  # fmt: skip
    bundle.write_manifest(folder, a, "fp32", "onnxruntime", context, **more)


def _seal_bundle(made: Draft) -> None:
    head = "manifest.json"
    if head in made.structures and head not in made.written:
        document = made.structure(head)
        if isinstance(document, dict) and (text_of := canonical(document.get("architecture"))) is not None:
            put(document, ("id",), sha256(text_of)[:12])
    for name in made.honest:
        if name != head:
            record(made, name, head, ("files", name, "sha256"), size=("files", name, "bytes"))
    sign_file(made, head)


def _use_bundle(folder: Path) -> None:
    show(folder)
    engine, tokenizer, opened = open_engine(folder, 1, cpu=True)
    with contextlib.closing(engine):
        list(generate(Session(engine), tokenizer, tokenizer.encode("fox"), Sampling(greedy=True), 2))
    assert opened.card()


@functools.cache
def served() -> tuple[Any, ...]:
    """A real engine, its tokenizer and its bundle, which stay open."""
    return open_engine(kept("bundle", _write_bundle), 1, cpu=True)


def _write_store(folder: Path) -> None:
    _write_bundle(folder)
    loaded = bundle.load(folder)
    entry = {"capability": "8.7", "library": "tensorrt", "version": "10.3", "context": 128, "bytes": 9,
             "machine": {"name": "Board", "power_mode": "15W"}, "weight_bytes": 5}  # fmt: skip
    for context in loaded.contexts:
        engine_store.add_stored(folder / "store", loaded.graph_sha256(context), b"plan" * 9, entry)


def _seal_store(made: Draft) -> None:
    for name in list(made.structures):
        if name.endswith(".json") and name.startswith("store/"):
            sign_file(made, name)


def _use_store(folder: Path) -> None:
    before = os.environ.get(engine_store.VARIABLE)
    os.environ[engine_store.VARIABLE] = str(folder / "store")
    try:
        for built in engine_store.engines_of(bundle.load(folder)):
            with contextlib.suppress(MerinoError):
                built.check()
        show(folder)
    finally:
        if before is None:
            del os.environ[engine_store.VARIABLE]
        else:
            os.environ[engine_store.VARIABLE] = before


# --- prompt caches ---------------------------------------------------------------------------------


def _write_cache(folder: Path) -> None:
    engine, tokenizer, opened = served()
    session = Session(engine)
    ids = tokenizer.encode(PROMPT)[:8]
    list(generate(session, tokenizer, ids, Sampling(greedy=True), 1))
    prompt_cache.save(folder / "p.cache", session, 6, opened)


def _seal_cache(made: Draft) -> None:
    if "p.cache" not in made.written:
        header, rest = made.structure("p.cache")
        put(header, ("arrays_sha256",), sha256(rest))
        sign(header)


def _use_cache(folder: Path) -> None:
    engine, tokenizer, opened = served()
    session = Session(engine)
    prompt_cache.load(folder / "p.cache", session, opened)
    list(generate(session, tokenizer, [*session.ids, 5], Sampling(greedy=True), 1))


# --- grammars --------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
}
KEYWORDS: tuple[tuple[str, Any], ...] = (
    *(("type", kind) for kind in ("object", "array", "string", "number", "integer", "null", ["string", "null"], "x")),
    *(("$ref", place) for place in ("#", "#/$defs/x", "http://x.y/z.json", "#/properties/name", "file:///etc/passwd")),
    *((f"{end}{what}", size) for end in ("min", "max") for what in ("Length", "Items") for size in (0, 5, 10**9)),
    *(("pattern", regex) for regex in ("(a|aa)+$", "(?=a)", "(a{1000}){1000}", "[", "\\p{L}{9999}", "a*" * 50, "")),
    *((name, number) for name in ("minimum", "maximum", "multipleOf") for number in (0, -1e308, 1e-300, 7, 0.1)),
    *((name, [{}, {"type": "string"}, False]) for name in ("anyOf", "oneOf", "allOf", "prefixItems")),
    *(("format", name) for name in ("date-time", "uuid", "ipv6", "x")),
    ("not", {}), ("if", {"const": 1}), ("const", {"a": [1, 2]}), ("enum", []), ("enum", ["a" * 5000] * 9),
    ("items", False), ("enum", list(range(3000))), ("properties", {str(n): {"$ref": "#"} for n in range(300)}),
    ("patternProperties", {"(": {}}),
)  # fmt: skip


def _step_schema(schema: Any, rng: Random) -> Any:
    if rng.random() < 0.5:
        return step(schema, rng)
    node = schema
    while isinstance(node, dict) and rng.random() < 0.7:
        inner = [value for value in node.values() if isinstance(value, dict)]
        if not inner:
            break
        node = rng.choice(inner)
    if isinstance(node, dict):
        name, value = rng.choice(KEYWORDS)
        node[name] = json.loads(json.dumps(value))
    return schema


_REGEX_WORDS = (
    *("(", ")", "[", "]", "{9}", "{1000}", "{0,99999}", "*", "+", "?", "|", "^", "$", ".", "\\d", "\\p{L}", "\\b"),
    *("(?i)", "(?=a)", "(?!a)", "(?<n>a)", "\\1", "[^a]", "[[:alpha:]]", "&&", "\\x{110000}", "(a|aa)+", "(.*)*"),
)


def _follow(grammar: Grammar) -> None:
    state, logits = grammar.begin(), np.zeros(served()[0].vocab_size, np.float32)
    for _ in range(4):
        if state.push(int(state.masked(logits).argmax())):
            break


def _use_schema(folder: Path) -> None:
    _follow(_grammars().json_schema(_read(folder / "schema.json")))


def _use_regex(folder: Path) -> None:
    _follow(_grammars().regex(_read(folder / "pattern.txt")))


def _read(path: Path) -> str:
    """The text as a command line or a request could hold it: with surrogates for bytes that are not UTF-8."""
    return content(path).decode(errors="surrogateescape")


@functools.cache
def _grammars() -> Grammars:
    engine, tokenizer, _ = served()
    return Grammars(tokenizer, engine.vocab_size)


# --- the server ------------------------------------------------------------------------------------

CHAT: dict[str, Any] = {
    "model": "small",
    "messages": [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}, *HELLO],
    "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 1, "stop": ["x"], "logit_bias": {"5": -1},
    "stream": False, "stream_options": {"include_usage": False}, "n": 1, "user": "me", "presence_penalty": 0.1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
}  # fmt: skip
COMPLETION: dict[str, Any] = {
    "model": "small",
    "prompt": PROMPT,
    "max_tokens": 3,
    "regex": "[a-z]+",
    "stop": "y",
    "min_p": 0.1,
}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "Adds one.", "parameters": PARAMETERS}
TOOLS: dict[str, Any] = {
    "messages": [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto", "parallel_tool_calls": True, "n": 2,
    "logprobs": True, "top_logprobs": 2, "stop_token_ids": [5], "min_tokens": 1, "max_completion_tokens": 3,
}  # fmt: skip
RESPONSE: dict[str, Any] = {
    "input": [*HELLO, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "c", "output": "2"}],
    "instructions": "Be short.", "max_output_tokens": 3, "temperature": 0.5, "text": {"format": {"type": "text"}},
    "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required", "include": ["message.output_text.logprobs"],
}  # fmt: skip
TOKENIZE: dict[str, Any] = {"content": PROMPT, "add_special": True, "with_pieces": True, "return_token_strs": True}


class _Server:
    """The application, called as a web server calls it."""

    def __init__(self) -> None:
        # Not `served`: the service knows what its engine holds, and other loaders run that one.
        # Its context has room for descriptions of tools.
        path = kept("server-bundle", functools.partial(_write_bundle, context=1024))
        self.engine, tokenizer, _ = open_engine(path, 1, cpu=True)
        self.loop = asyncio.new_event_loop()
        self.service = Service(self.engine, tokenizer, "small", waiting=4, key=None)
        self.application, self.asked = self.service.application(), 0

    def close(self) -> None:
        self.service.close()
        self.engine.close()
        self.loop.close()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer."""
        return self.loop.run_until_complete(asyncio.wait_for(self._post(path, body), 30))

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
                 "raw_path": path.encode(), "query_string": b"", "headers": headers, "scheme": "http", "root_path": "",
                 "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}  # fmt: skip
        sent: list[dict[str, Any]] = []
        ended, given = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await ended.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.application(scope, receive, send)
        ended.set()
        return int(sent[0]["status"]), b"".join(message.get("body", b"") for message in sent[1:])


_server: list[_Server] = []
ORDINARY = json.dumps({"model": "small", "messages": HELLO, "max_tokens": 1}).encode()


def _use_server(folder: Path, path: str) -> None:
    if not _server:
        _server.append(_Server())
    server, body = _server[0], content(folder / "body.json")
    server.asked += 1
    try:
        answer = server.post(path, body)
        if server.asked % 20 == 1:  # an ordinary request afterwards
            status, _ = server.post("/v1/chat/completions", ORDINARY)
            assert status == 200, f"an ordinary request is answered with {status}"
    except BaseException:
        _server.clear()
        server.close()
        raise
    _check_answer(*answer)


def _check_answer(status: int, body: bytes) -> None:
    """Raise AssertionError for an answer that no client can use, and InputError for a refusal."""
    if body.startswith(b"data:"):
        assert b'"server_error"' not in body, body[:300]
        return
    document = json.loads(body)
    assert status < 500, f"{status} {document}"
    if status != 200:
        raise InputError(document["error"]["message"])


# --- evaluation ------------------------------------------------------------------------------------

_SETS = text("_", "A.", "\n\n", " = x = ", "<unk>")


def _use_sets(folder: Path) -> None:
    refusal = None
    for task in MERINO14.values():
        try:
            task.read(folder)
        except MerinoError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def _report() -> Files:
    entry = {"items": 3, "items_sha256": "0" * 64, "metrics": {"acc": {"value": 0.5, "stderr": 0.1}},
             "per_item": {"acc": [1.0, 0.0, 0.5]}, "seconds": 1.0}  # fmt: skip
    words = {**entry, "metrics": {"word_perplexity": {"value": 9.0, "stderr": None}},
             "per_item": {"word_perplexity": [[-5.0, 3], [-7.0, 2]]}}  # fmt: skip
    whole = {"file": "t", "text_sha256": "1" * 64, "bytes": 90, "words": 9, "tokens": 12, "window": 8, "stride": 4,
             "metrics": {}, "per_window": [[-5.0, 8], [-3.0, 4]], "seconds": 1.0}  # fmt: skip
    payload = {"model": {"id": "x"}, "engine": "OnnxEngine", "limit": None, "tasks": {"boolq": entry, "ptb": words},
               "mean_accuracy": 0.5, "perplexity": whole}  # fmt: skip
    return written(lambda folder: artefact.write_json(folder / "e.json", "evaluation", payload))


def _use_report(folder: Path) -> None:
    from merino_edge.runtime.evaluation import harness, perplexity
    from merino_edge.runtime.evaluation.forms import Report

    other = artefact.read_json(folder / "e.json", harness.KIND, harness.SCHEMA_VERSION, form=Report)
    ours = json.loads(_own_report())
    with mock.patch.object(harness, "RESAMPLES", 20):  # the same steps in less time
        harness.differences(ours, other)
        perplexity.differences(ours, other)


@functools.cache
def _own_report() -> bytes:
    return _report()["e.json"]


# --- the demo --------------------------------------------------------------------------------------


def _write_demo(folder: Path) -> None:
    steps = {
        "profile": {"key": "0" * 64, "made": {"t.jsonl": "1" * 64}, "result": {}, "seconds": 1.5, "other_load": 0.1}
    }
    artefact.write_json(folder / STATE, DEMO_KIND, {"steps": steps})


def _use_demo(folder: Path) -> None:
    steps = Steps(folder, {}, stderr())
    steps.done("profile")
    if "profile" in steps.records:
        steps.other_load("profile")


LOADERS = (
    Loader(
        "bundle",
        functools.partial(written, _write_bundle),
        _use_bundle,
        codecs={"tokenizer.json": TOKENIZER, ".onnx": GRAPH, ".data": BYTES},
        seal=_seal_bundle,
        weights={"manifest.json": 3, "model.onnx": 4, "tokenizer.json": 0.5, "model.onnx.data": 0.5},
    ),
    Loader(
        "engine",
        functools.partial(written, _write_store),
        _use_store,
        seal=_seal_store,
        weights=dict.fromkeys(("manifest.json", "model.onnx", "model.onnx.data", "tokenizer.json", "chat.json"), 0),
        refuses=False,  # an engine that is not what it says is passed over
    ),
    Loader(
        "prompt-cache",
        functools.partial(written, _write_cache),
        _use_cache,
        codecs={".cache": HEADED},
        seal=_seal_cache,
    ),
    Loader(
        "grammar",
        lambda: {"schema.json": json.dumps(SCHEMA).encode()},
        _use_schema,
        codecs={"schema.json": Codec(json.loads, _step_schema, encode)},
        package="llguidance",
    ),
    Loader(
        "regex",
        lambda: {"pattern.txt": b"(yes|no)[0-9]{1,3}"},
        _use_regex,
        codecs={".txt": text(*_REGEX_WORDS)},
        package="llguidance",
    ),
    *(
        Loader(
            name,
            lambda body=body: {"body.json": json.dumps(body).encode()},  # type: ignore[misc]
            functools.partial(_use_server, path=path),
            package="llguidance",
        )
        for name, path, body in (
            ("server-chat", "/v1/chat/completions", CHAT),
            ("server-text", "/v1/completions", COMPLETION),
            ("server-tools", "/v1/chat/completions", TOOLS),
            ("server-responses", "/v1/responses", RESPONSE),
            ("server-tokenize", "/tokenize", TOKENIZE),
        )
    ),
    Loader(
        "evaluation",
        functools.partial(written, write_sets),
        _use_sets,
        codecs={".txt": _SETS, ".xz": PACKED},
    ),
    Loader("report", _report, _use_report, seal=lambda made: sign_file(made, "e.json"), package="lm_eval"),
    Loader("demo", functools.partial(written, _write_demo), _use_demo, seal=lambda made: sign_file(made, STATE)),
)
