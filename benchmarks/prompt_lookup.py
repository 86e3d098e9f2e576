"""What prompt lookup gains and costs: a bundle's answers with and without guesses, interleaved, greedy.

    merino-edge import smollm2-135m-instruct --out ckpt && merino-edge export ckpt --out smollm2-int4 --precision int4
    python benchmarks/prompt_lookup.py smollm2-int4 --rounds 7 --threads 2

"rewriting" prompts ask for a text back with a change, as summaries and edits do; "asking" prompts are questions, where
there is little to guess. Prints decode tokens per second, medians over rounds with their spread (1.4826 MAD), the ratio
round by round, how many guesses were right, and how many answers are the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path

from merino_edge.corpus import tiny_stories
from merino_edge.measurement import spread_percent
from merino_edge.runtime.chat import Chat
from merino_edge.runtime.engine import Engine, open_engine
from merino_edge.runtime.generation import Generation
from merino_edge.runtime.sampling import Sampling
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
    stories = [story.strip() for story in tiny_stories(stories=8, seed=3).split("\n\n") if story.strip()]
    texts = [" ".join("\n".join(stories[i : i + 2]).split()) for i in range(4)]
    rewriting = [
        f"Write this text again and correct its spelling:\n\n{texts[0]}",
        f"Summarise this text, using its own sentences:\n\n{texts[1]}",
        f"Write this text again, every sentence on a line of its own:\n\n{texts[2]}",
        f"Quote the first three sentences of this text:\n\n{texts[3]}",
        f"Rename the variable `result` to `r` and give the whole code back:\n\n{CODE}",
    ]
    asking = [
        "What is the capital of France, and what is it known for?",
        "Write a short story about a dog who finds a key.",
        "Explain why the sky is blue to a child.",
        "Give me five tips for sleeping well.",
        "What is the difference between a list and a tuple in Python?",
    ]
    return {"rewriting": rewriting, "asking": asking}


def answer(engine: Engine, tokenizer: Tokenizer, prompt: str, lookup: bool, most: int) -> Generation:
    made = Chat(engine, tokenizer, Sampling(greedy=True), most, lookup=lookup).send(prompt)
    for _ in made:
        pass
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=160)
    options = parser.parse_args()
    engine, tokenizer, _ = open_engine(options.bundle, options.threads)
    with contextlib.closing(engine):
        for kind, asked in prompts().items():
            speeds: dict[bool, list[float]] = {True: [], False: []}
            guessed = right = same = 0
            for number in range(options.rounds):
                made = {True: [], False: []}
                for prompt in asked:
                    for lookup in (True, False) if number % 2 else (False, True):
                        made[lookup].append(answer(engine, tokenizer, prompt, lookup, options.max_tokens))
                for lookup, answers in made.items():
                    steps = sum(a.statistics.generated_tokens - 1 for a in answers)
                    speeds[lookup].append(1e3 * steps / sum(a.statistics.decode_ms for a in answers))
                guessed += sum(a.statistics.guessed_tokens for a in made[True])
                right += sum(a.statistics.right_guesses for a in made[True])
                same += sum(a.tokens == b.tokens for a, b in zip(made[True], made[False], strict=True))
            ratios = [on / off for on, off in zip(speeds[True], speeds[False], strict=True)]
            for lookup, name in ((False, "plain"), (True, "lookup")):
                print(
                    f"{kind:<10} {name:<7} {statistics.median(speeds[lookup]):7.1f} tokens/s, "
                    f"spread {spread_percent(speeds[lookup]):.1f} %"
                )
            print(
                f"{kind:<10} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}), "
                f"{right} of {guessed} guesses right, {same} of {options.rounds * len(asked)} answers the same"
            )


if __name__ == "__main__":
    main()
