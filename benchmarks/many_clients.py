"""Many clients of one server: tokens per second of all together, the wait for the first token, and equal answers.

    pip install openai xllamacpp           # xllamacpp is llama.cpp with its server in a wheel
    python benchmarks/many_clients.py URL [--key KEY] [--clients 1,2,4] [--rounds 5] [--tokens 64]
    python benchmarks/many_clients.py MODEL.gguf ...        # opens llama-server, with as many slots as clients

URL is that of any server with OpenAI's API, for example http://127.0.0.1:8080/v1. Numbers of clients take turns. Each
client asks greedily, and each question is another one in every round. At the end all questions are asked once more,
one at a time: an answer that depends on who else was served is counted. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai

THINGS = ("a river", "the moon", "bread", "a bicycle", "winter", "the sea", "a clock", "an orange", "paper", "a violin")
ASKED = ("What is {}?", "Tell me a story about {}.", "Why do people like {}?", "Write three facts about {}.")


class Answer(NamedTuple):
    """What a client got, and when."""

    text: str
    tokens: int
    first_s: float
    seconds: float


def ask(client: openai.OpenAI, model: str, question: str, tokens: int) -> Answer:
    """The greedy answer to one question, streamed."""
    begun, first_s, text, count = time.perf_counter(), 0.0, "", 0
    stream: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            first_s = first_s or time.perf_counter() - begun
            text += event.choices[0].delta.content
        count = event.usage.completion_tokens if event.usage else count
    return Answer(text, count, first_s, time.perf_counter() - begun)


def llama_server(path: str, slots: int, positions: int, threads: int) -> Any:
    """llama.cpp's server on a port of its own. Each slot has `positions`."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    options = xllamacpp.CommonParams()
    options.model.path, options.n_gpu_layers, options.n_parallel = path, 0, slots
    options.n_ctx, options.verbosity = positions * slots, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of llama-server")
    given = parser.parse_args()
    clients = [int(part) for part in given.clients.split(",")]
    opened = None if "://" in given.server else llama_server(given.server, max(clients), 1024, given.threads)
    url = given.server if opened is None else f"{opened.listening_address}/v1"
    client = openai.OpenAI(base_url=url, api_key=given.key, max_retries=0, timeout=600)
    model = client.models.list().data[0].id
    questions = itertools.cycle([form.format(thing) for thing in THINGS for form in ASKED])
    ask(client, model, next(questions), 8)  # the first answer loads what is loaded late
    speeds, firsts, given_answers = defaultdict(list), defaultdict(list), {}
    for _ in range(given.rounds):
        for count in clients:
            asked = [next(questions) for _ in range(count)]
            begun = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                answers = list(pool.map(lambda question: ask(client, model, question, given.tokens), asked))
            speeds[count].append(sum(answer.tokens for answer in answers) / (time.perf_counter() - begun))
            firsts[count].append(statistics.median(answer.first_s for answer in answers))
            given_answers |= {question: answer.text for question, answer in zip(asked, answers, strict=True)}
    print("clients  tokens/s of all  (range)           first token, s   times one client")
    for count in clients:
        ratio = statistics.median(a / b for a, b in zip(speeds[count], speeds[clients[0]], strict=True))
        low, high = min(speeds[count]), max(speeds[count])
        print(
            f"{count:7d}  {statistics.median(speeds[count]):15.1f}  ({low:.1f} - {high:.1f})".ljust(44)
            + f"{statistics.median(firsts[count]):14.2f}   {ratio:.2f}"
        )
    alone = {question: ask(client, model, question, given.tokens).text for question in given_answers}
    other = sum(alone[question] != text for question, text in given_answers.items())
    print(f"{other} of {len(alone)} answers differ from those of a client that is alone")


if __name__ == "__main__":
    main()
