"""Client libraries of OpenAI's API against a running server: what of each works.

    merino-edge serve BUNDLE --port 8080
    pip install openai litellm langchain-openai 'pydantic-ai-slim[openai]' instructor llm
    pip install 'llama-index-llms-openai-like>=0.5'  # in another environment
    python benchmarks/clients.py http://127.0.0.1:8080

Prints a line for each client and feature, and ends with 1 where one failed. A client that is not installed is left
out. Answers need not make sense: a small model's are checked for their form only. It needs none of our packages.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

CHECKS: list[tuple[str, str, Callable[[], None]]] = []
URL = (sys.argv[1:] or ["http://127.0.0.1:8080"])[0].rstrip("/")
BASE = f"{URL}/v1"
HELLO: list[Any] = [{"role": "user", "content": "What is the weather in Ulm?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Ulm", "Bonn"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
FLAT: Any = {"type": "function", **TOOL["function"]}
os.environ.setdefault("OPENAI_API_KEY", "none")


def check(package: str, feature: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a check of a client."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS.append((package, feature, function))
        return function

    return add


def model() -> str:
    """The served model's name."""
    with urllib.request.urlopen(f"{BASE}/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def openai_client() -> Any:
    import openai

    return openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)


# --- openai ---


@check("openai", "chat, stream, turns")
def _() -> None:
    client, talk = openai_client(), list(HELLO)
    for _ in "12":
        message = client.chat.completions.create(model=model(), messages=talk, max_tokens=8).choices[0].message
        talk += [message, *HELLO]
    pieces = client.chat.completions.create(model=model(), messages=talk, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)


@check("openai", "tools: forced, result, streamed")
def _() -> None:
    client, talk = openai_client(), list(HELLO)
    asked = {"model": model(), "tools": [TOOL], "max_tokens": 60}
    done = client.chat.completions.create(**asked, messages=talk, tool_choice="required", parallel_tool_calls=False)
    call = done.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Ulm", "Bonn")
    talk += [done.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    assert client.chat.completions.create(**asked, messages=talk).choices[0].finish_reason
    one = {"tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(**asked, messages=HELLO, **one) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.tool_calls


@check("openai", "structured answers by a pydantic model")
def _() -> None:
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Ulm", "Bonn"]

    done = openai_client().chat.completions.parse(model=model(), messages=HELLO, response_format=Place, max_tokens=40)
    assert done.choices[0].message.parsed.city in ("Ulm", "Bonn")


@check("openai", "logprobs, n, prompts, echo")
def _() -> None:
    client = openai_client()
    done = client.chat.completions.create(
        model=model(), messages=HELLO, max_tokens=4, n=2, logprobs=True, top_logprobs=2
    )
    assert len(done.choices) == 2 and len(done.choices[1].logprobs.content[0].top_logprobs) == 2
    texts = client.completions.create(model=model(), prompt=["One", "Two"], max_tokens=4, echo=True, logprobs=1)
    assert [choice.text[:3] for choice in texts.choices] == ["One", "Two"]


@check("openai", "responses: text, stream, tools, form")
def _() -> None:
    client = openai_client()
    assert client.responses.create(model=model(), input="Hello", max_output_tokens=16).output_text
    form: Any = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    asked = {"model": model(), "input": HELLO, "text": {"format": form}, "max_output_tokens": 40}
    with client.responses.stream(**asked) as stream:  # the helper takes no cut response for a final one
        for _ in stream:
            pass
        assert json.loads(stream.get_final_response().output_text)
    done = client.responses.create(
        model=model(), input=HELLO, tools=[FLAT], tool_choice="required", max_output_tokens=60
    )
    call = done.output[0]
    history = [*HELLO, *done.output]
    history += [{"type": "function_call_output", "call_id": c.call_id, "output": "rain"} for c in done.output]
    assert call.type == "function_call" and client.responses.create(
        model=model(), input=history, tools=[FLAT], max_output_tokens=16
    )


@check("openai", "embeddings are refused by name")
def _() -> None:
    import openai

    said = ""
    try:
        openai_client().embeddings.create(model=model(), input="Hello")
    except openai.BadRequestError as error:
        said = str(error)
    assert "not served" in said


# --- others ---


@check("litellm", "chat, stream, tools, logprobs, n")
def _() -> None:
    import litellm

    litellm.telemetry = False
    asked: dict[str, Any] = {"model": f"openai/{model()}", "api_base": BASE, "api_key": "none", "messages": HELLO}
    assert litellm.completion(**asked, max_tokens=8).choices[0].message.content
    assert "".join(p.choices[0].delta.content or "" for p in litellm.completion(**asked, max_tokens=8, stream=True))
    called = litellm.completion(**asked, tools=[TOOL], tool_choice="required", max_tokens=60)
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    several = litellm.completion(**asked, n=2, logprobs=True, top_logprobs=1, max_tokens=4)
    assert len(several.choices) == 2 and several.choices[0].logprobs


@check("litellm", "responses")
def _() -> None:
    import litellm

    done = litellm.responses(
        model=f"openai/{model()}", api_base=BASE, api_key="none", input="Hello", max_output_tokens=16
    )
    assert done.output


@check("langchain_openai", "chat, stream, tools, structured (3 ways), logprobs")
def _() -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Place(BaseModel):
        """A place."""

        city: Literal["Ulm", "Bonn"]

    chat = ChatOpenAI(model=model(), base_url=BASE, api_key="none", max_tokens=60)  # type: ignore[call-arg, arg-type]
    assert chat.invoke("Hello").content and list(chat.stream("Hello"))
    assert chat.bind_tools([Place], tool_choice="required").invoke("Where?").tool_calls
    for method in ("json_schema", "function_calling"):
        assert chat.with_structured_output(Place, method=method).invoke("Where?").city  # type: ignore[arg-type, union-attr]
    assert chat.bind(logprobs=True).invoke("Hello").response_metadata["logprobs"]["content"]


@check("langchain_openai", "responses")
def _() -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model(), base_url=BASE, api_key="none", use_responses_api=True, max_tokens=20)  # type: ignore[call-arg, arg-type]
    assert chat.invoke("Hello").content and list(chat.stream("Hello"))


@check("pydantic_ai", "chat, structured by a tool, an agent's tool")
def _() -> None:
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.settings import ModelSettings

    class Place(BaseModel):
        city: Literal["Ulm", "Bonn"]

    settings = ModelSettings(max_tokens=60)
    served = OpenAIChatModel(model(), provider=OpenAIProvider(base_url=BASE, api_key="none"), settings=settings)
    assert asyncio.run(Agent(served).run("Hello")).output
    assert asyncio.run(Agent(served, output_type=Place).run("Where?")).output.city
    agent: Any = Agent(served)
    agent.tool_plain(lambda: "rain", name="weather")
    assert asyncio.run(agent.run("How is the weather?")).output


@check("pydantic_ai", "responses")
def _() -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.settings import ModelSettings

    provider = OpenAIProvider(base_url=BASE, api_key="none")
    served = OpenAIResponsesModel(model(), provider=provider, settings=ModelSettings(max_tokens=20))
    assert asyncio.run(Agent(served).run("Hello")).output


@check("instructor", "structured by tools, by a schema, by JSON")
def _() -> None:
    import instructor
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Ulm", "Bonn"]

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai_client(), mode=mode)
        place = client.chat.completions.create(
            model=model(), messages=HELLO, response_model=Place, max_tokens=60, max_retries=0
        )
        assert place.city in ("Ulm", "Bonn")


@check("llm", "prompt, stream, tools")
def _() -> None:
    with TemporaryDirectory() as folder:
        os.environ["LLM_USER_PATH"] = folder
        name = {"model_id": "served", "model_name": model(), "api_base": BASE, "supports_tools": True}
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([name]))
        import llm

        served = llm.get_model("served")
        served.key = "none"
        assert served.prompt("Hello", max_tokens=8, stream=False).text()
        assert "".join(served.prompt("Hello", max_tokens=8, stream=True))

        def weather(city: str) -> str:
            """The weather of a city."""
            return f"It rains in {city}."

        assert served.conversation(tools=[weather], chain_limit=3).chain("How is the weather?").text() is not None


@check("llama_index", "chat, stream, complete, tools")
def _() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def weather(city: str) -> str:
        """The weather of a city."""
        return f"It rains in {city}."

    served = OpenAILike(
        model=model(), api_base=BASE, api_key="none", is_chat_model=True, is_function_calling_model=True, max_tokens=60
    )
    asked = [ChatMessage(role="user", content="Hello")]
    assert served.chat(asked).message.content and list(served.stream_chat(asked))
    tool = FunctionTool.from_defaults(weather)
    answer = served.chat_with_tools([tool], user_msg="How is the weather?", tool_required=True)
    assert served.get_tool_calls_from_response(answer)


def main() -> int:
    failures = 0
    for package, feature, function in CHECKS:
        if find_spec(package) is None:
            print(f"{package}: {feature}: not installed")
            continue
        try:
            function()
            print(f"{package}: {feature}: works")
        except Exception as error:  # whatever a library raises
            failures += 1
            print(f"{package}: {feature}: FAILS: {type(error).__name__} {' '.join(str(error).split())[:300]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
