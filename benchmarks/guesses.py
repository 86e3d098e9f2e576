"""What guesses gain and cost: a bundle's answers without, with prompt lookup and with a draft model, in turns, greedy.

    merino-edge import smollm2-135m-instruct --out ckpt && merino-edge export ckpt --out smollm2-int4 --precision int4
    python benchmarks/guesses.py smollm2-int4 --rounds 7 --threads 2
    python benchmarks/guesses.py smollm2-fp32 --draft smollm2-fast                       # with the same tokenizer

"rewriting" prompts ask for a text back with a change, as summaries and edits do; "asking" prompts are questions, where
there is little to draft. It prints decode tokens per second, as medians over rounds with their spread (1.4826 MAD), and
the ratio round by round. It also prints how many draft tokens were accepted, and how many answers are the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path

from merino_edge.data.tiny_stories import SEPARATOR, tiny_stories
from merino_edge.latency.measurement import spread_percent
from merino_edge.runtime.chat import Chat
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.speculative.draft_model import DraftModel
from merino_edge.runtime.speculative.drafter import Proposer
from merino_edge.runtime.speculative.prompt_lookup import PromptLookup
from merino_edge.tokenizer import Tokenizer

CODE = """def area(w, h):
    if w < 0 or h < 0:
        raise ValueError("negative")
    result = w * h
    return result

def volume(w, h, d):
    result = area(w, h) * d
    return result
"""


def prompts() -> dict[str, list[str]]:
    stories = tiny_stories(stories=8, seed=3).split(SEPARATOR)
    texts = [" ".join("\n".join(stories[i : i + 2]).split()) for i in range(4)]
    tasks = (
        "Write this text again and correct its spelling:",
        "Summarise this text, using its own sentences:",
        "Write this text again, every sentence on a line of its own:",
        "Quote the first three sentences of this text:",
    )
    rewriting = [f"{task}\n\n{text}" for text in texts for task in tasks]
    rewriting.append(f"Rename the variable `result` to `r` and give the whole code back:\n\n{CODE}")
    asking = [
        "What is the capital of France, and what is it known for?",
        "Write a short story about a dog who finds a key.",
        "Explain why the sky is blue to a child.",
        "Give me five tips for sleeping well.",
        "What is the difference between a list and a tuple in Python?",
    ]
    return {"rewriting": rewriting, "asking": asking}


def answer(engine: Engine, tokenizer: Tokenizer, prompt: str, proposer: Proposer | None, most: int) -> Generation:
    made = Chat(engine, tokenizer, Sampling(greedy=True), most, proposer=proposer).send(prompt)
    for _ in made:
        pass
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", type=Path, help="a bundle with the same tokenizer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=160)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        engine, tokenizer, opened = open_engine(options.bundle, options.threads)
        stack.enter_context(contextlib.closing(engine))
        proposers: dict[str, Proposer | None] = {"plain": None, "lookup": PromptLookup()}
        if options.draft:
            draft = DraftModel.open(options.draft, opened, options.threads)
            proposers["draft"] = stack.enter_context(contextlib.closing(draft))
        for kind, asked in prompts().items():
            compare(engine, tokenizer, proposers, kind, asked, options.rounds, options.max_tokens)


def compare(
    engine: Engine,
    tokenizer: Tokenizer,
    proposers: dict[str, Proposer | None],
    kind: str,
    asked: list[str],
    rounds: int,
    most: int,
) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in proposers}
    guessed, right, same = (dict.fromkeys(proposers, 0) for _ in range(3))
    for number in range(rounds):
        made: dict[str, list[Generation]] = {name: [] for name in proposers}
        for prompt in asked:
            for name in list(proposers)[:: 1 if number % 2 else -1]:
                made[name].append(answer(engine, tokenizer, prompt, proposers[name], most))
        for name, answers in made.items():
            steps = sum(a.statistics.generated_tokens - 1 for a in answers)
            speeds[name].append(1e3 * steps / sum(a.statistics.decode_ms for a in answers))
            guessed[name] += sum(a.statistics.drafted_tokens for a in answers)
            right[name] += sum(a.statistics.accepted_tokens for a in answers)
            same[name] += sum(a.tokens == b.tokens for a, b in zip(answers, made["plain"], strict=True))
    for name, found in speeds.items():
        ratios = [on / off for on, off in zip(found, speeds["plain"], strict=True)]
        print(
            f"{kind:<10} {name:<7} {statistics.median(found):7.1f} tokens/s, spread {spread_percent(found):.1f} %, "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) times plain, "
            f"{right[name]} of {guessed[name]} guesses right, {same[name]} of {rounds * len(asked)} answers the same",
            flush=True,
        )


if __name__ == "__main__":
    main()
