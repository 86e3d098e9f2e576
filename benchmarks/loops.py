"""How often a model's long answers end in a loop, with the default sampling and with others.

    python benchmarks/loops.py BUNDLE [--prompts 200] [--tokens 400] [--answers FILE] [--sampling NAME=VALUE,...]

Each prompt is a chat of its own with its own seed. `--sampling` may be repeated; `default` and `control` (no penalty at
all) are names. A row counts the answers that end in a loop, and those that end by themselves. It also has the share of
words that repeat, and how many questions of fact are answered rightly. An answer loops where its last characters are
three or more times the same, whatever its numbers are. `--answers` keeps all answers.
"""

from __future__ import annotations

import argparse
import json
import re
from contextlib import closing
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean

from merino_edge.runtime.chat import Chat
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling

WANTED = (
    "Write a long story about {}.",
    "Write a detailed essay about {}.",
    "Tell me everything that you know about {}.",
    "Make a list of twenty ideas for {}.",
    "Write a diary of a week with {}, one entry a day.",
    "Write a long poem about {}.",
    "Write a dialogue between two friends who talk about {}.",
    "Write a blog post with a title and sections about {}.",
)
SUBJECTS = (
    "a lighthouse keeper and a storm",
    "a small dog that is lost in a city",
    "the history of computers",
    "a journey to the moon",
    "a garden in spring",
    "a family dinner",
    "the year 2023",
    "learning to play the piano",
    "a market in a village",
    "machine learning",
    "a river and its fish",
    "an old train",
    "healthy food",
    "a dragon that is afraid of fire",
    "a school trip to a museum",
    "saving energy at home",
    "a detective and a missing clock",
    "the weather",
    "a robot that wants to paint",
    "a birthday party",
)
FACTS = {
    "What is the capital of France?": "paris",
    "What is the capital of Italy?": "rome",
    "What is the capital of Japan?": "tokyo",
    "What is the capital of Spain?": "madrid",
    "What is the capital of Germany?": "berlin",
    "What is the capital of England?": "london",
    "What is the capital of Egypt?": "cairo",
    "What is the capital of Russia?": "moscow",
    "What is the capital of Greece?": "athens",
    "What is the capital of Portugal?": "lisbon",
    "What is 2 + 2?": "4",
    "What is 5 + 3?": "8",
    "How many days does a week have?": "7|seven",
    "How many months does a year have?": "12|twelve",
    "Which planet do we live on?": "earth",
    "What is the largest planet of the solar system?": "jupiter",
    "What is the chemical symbol of water?": "h2o|h₂o",
    "What is the chemical symbol of gold?": "au",
    "Who wrote Romeo and Juliet?": "shakespeare",
    "Who painted the Mona Lisa?": "leonardo|vinci",
    "Who developed the theory of relativity?": "einstein",
    "What gas do plants take in from the air?": "carbon dioxide|co2",
    "What is the opposite of hot?": "cold",
    "What is the color of the sky on a clear day?": "blue",
    "What is the largest ocean on Earth?": "pacific",
    "Which animal is known as the king of the jungle?": "lion",
    "In which continent is Brazil?": "south america",
    "In which continent is Kenya?": "africa",
    "What language do people speak in Mexico?": "spanish",
    "What do bees make?": "honey",
    "How many legs does a spider have?": "8|eight",
    "What is frozen water called?": "ice",
    "Which month comes after May?": "june",
    "Which day comes after Monday?": "tuesday",
    "What is the currency of the United States?": "dollar",
    "What organ pumps blood through the body?": "heart",
    "At what temperature in degrees Celsius does water boil?": "100",
    "What is the name of the star at the center of the solar system?": "sun",
    "Who was the first president of the United States?": "washington",
    "What is the tallest mountain on Earth?": "everest",
}
LEAST_LOOP = 60  # characters
NAMED = {"default": Sampling(), "control": Sampling(loop_penalty=0.0)}


def questions(count: int) -> list[str]:
    """The first `count` prompts: every fifth asks for a fact, the others for a long text."""
    long = [text.format(subject) for subject, text in product(SUBJECTS, WANTED)]
    long = [long[i * 37 % len(long)] for i in range(len(long))]  # 37 and 160 have no common factor
    facts, made = iter(FACTS), list[str]()
    for i, text in enumerate(long):
        made += [text] if i % 4 else [next(facts), text]
    return made[:count]


def loops(text: str) -> bool:
    """Whether a text ends with three or more equal pieces, 60 characters or more; numbers that count are equal."""
    text = re.sub(r"\d+", "0", text[-1200:]).strip()
    for period in range(1, len(text) // 3 + 1):
        tail = text[-max(3 * period, LEAST_LOOP) :]
        if len(tail) >= LEAST_LOOP and tail[period:] == tail[:-period]:
            return True
    return False


def repeated(text: str) -> float:
    """The share of sequences of four words that came before in the text."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def parsed(text: str) -> Sampling:
    if text in NAMED:
        return NAMED[text]
    pairs = [pair.split("=") for pair in text.split(",")]
    return Sampling(**{name: json.loads(value) for name, value in pairs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--sampling", action="append")
    options = parser.parse_args()
    engine, tokenizer, _ = open_engine(options.bundle, options.threads)
    print("| sampling | prompts | loops | ended | repeated four words, % | facts right |")
    print("|---|---|---|---|---|---|")
    with closing(engine):
        for name in options.sampling or ["control", "default"]:
            answers = []
            for number, question in enumerate(questions(options.prompts)):
                sampling = Sampling(**{**asdict(parsed(name)), "seed": number})
                talk = Chat(engine, tokenizer, sampling, options.tokens)
                answer = talk.send(question)
                text = "".join(answer)
                answers.append((question, text, answer.finish_reason))
                if options.answers:
                    with options.answers.open("a") as file:
                        fields = {"sampling": name, "question": question, "text": text, "tokens": answer.tokens}
                        file.write(json.dumps({**fields, "finish_reason": answer.finish_reason}) + "\n")
            long = [text for question, text, _ in answers if question not in FACTS]
            facts = [bool(re.search(rf"\b({FACTS[q]})\b", text.lower())) for q, text, _ in answers if q in FACTS]
            row = (len(answers), sum(map(loops, long)), sum(reason == "stop" for *_, reason in answers))
            shares = f"{100 * fmean(map(repeated, long)):.1f} | {sum(facts)} of {len(facts)}"
            print(f"| {name} | {' | '.join(map(str, row))} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
