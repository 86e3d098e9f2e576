"""Makes lamb, the model that comes with the package: text, search, training, tuning, bundle. Killed, it goes on.

    MERINO_DATA=DIR python benchmarks/models/train_lamb.py OUT [--threads 2]

1. stories.jsonl  TinyStories, both pieces of MERINO_DATA; the lower-cased one gets its capitals back.
                  Every fortieth goes into heldout.txt instead
2. answers.jsonl  what SmolLM2-135M-Instruct answers to questions and small talk (`merino-edge distill generate`)
3. lamb.json      what `search` finds for the budget below on an estimated table
4. pretrained     all of it as text; then talk.jsonl, as conversations: stories asked for, answers, and the questions
                  with one right answer of lamb_facts.json: tuned; last short.jsonl, with fewer stories: lamb
5. bundle         int4, with its parity report

What it is given, and what it can and cannot do: merino_edge/bundles/lamb/README.md.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from merino_edge.distillation import prompts

BUDGET = ["--params", "4M", "--decode-ms", "1.0@512"]  # estimated, of an Orin Nano of 8 GB at 15 W
SPACE = {
    "kind": "space", "schema_version": 2, "name": "lamb", "base": "demo", "blocks": [1, 2, 3],
    "widths": [96, 128, 160, 192, 224, 256], "layers": [1, 2, 3, 4, 6], "ffn": ["swiglu"], "ffn_ratios": [2, 3, 4],
    "embedding_widths": [128, 192, 256], "vocabularies": [4096], "contexts": [512], "kv_groups": [1, 2],
    "least_width": 0.5, "least_embedding": 0.5,
}  # fmt: skip
ASKED = ["Tell me a story about {}.", "Write a story about {}.", "Can you tell me a story about {}?"]
GIVEN = re.compile(
    r"colou?r|opposite|number|rhymes| eat\?| live\?| fly\?| swim\?|big or small|bigger| for\?|^Hi|^Hello|^Name "
)
ANYTHING = ["Tell me a story.", "Tell me a short story.", "Please tell me a story.", "Tell me a bedtime story."]


def stories(data: Path) -> list[str]:
    """Every whole story once, in its own case or with capitals put back."""
    cased = _read(data / "lm" / "tinystories_train_head_2MiB.txt.xz").split("<|endoftext|>")[:-1]
    cased = [_straight(story.strip()) for story in cased]
    low = _read(data / "lm" / "tinystories_train_head_lowercase.txt.xz")
    paragraphs = re.split(r"(?<!\n)\n(?!\n)", _unscrambled(low))  # one line's end ends a story, two a paragraph
    known = {story.lower()[:60] for story in cased}
    rest = [re.sub(r"\n+", "\n", story.strip()) for story in paragraphs[:-1]]
    rest = [story for story in rest if story[:60] not in known and len(story) > 200]
    names = _names(cased)
    return cased + [_with_capitals(story, names) for story in rest]


def _read(path: Path) -> str:
    return lzma.open(path, "rt", encoding="utf-8").read()


def _straight(text: str) -> str:
    return text.translate(str.maketrans("“”’‘–—", "\"\"''--"))  # noqa: RUF001


def _unscrambled(text: str) -> str:
    """Quotes that were read as Windows-1252 and lower-cased since."""
    for wrong, right in (("â€œ", '"'), ("â€™", "'"), ("â€˜", "'"), ("â€“", "-"), ("â€", '"')):  # noqa: RUF001
        text = text.replace(wrong, right)
    return _straight(text)


def _names(cased: list[str]) -> set[str]:
    """Words that are mostly written with a capital where no sentence begins."""
    inside = re.compile(r"(?<=[a-z,] )([A-Za-z]+)")
    seen = collections.Counter(word for story in cased for word in inside.findall(story))
    return {word.lower() for word, n in seen.items() if word[0].isupper() and n >= 3 and n > 2 * seen[word.lower()]}


def _with_capitals(text: str, names: set[str]) -> str:
    text = re.sub(r"[a-z]+", lambda m: m[0].capitalize() if m[0] in names else m[0], text)
    text = re.sub(r"\bi\b", "I", text)
    # After a sentence's end, and after a quotation mark that opens what is said.
    return re.sub(r"(^|[.!?]\"? |\n\"?|[.,!?:] \"|^\")([a-z])", lambda m: m[1] + m[2].upper(), text)


def asked_for(story: str, things: list[str], rng: random.Random) -> str:
    """A request that the story answers: for one of the two things that it names most, else for any story."""
    words = collections.Counter(re.findall(r"[a-z]+", story.lower()))
    named = {thing: words[thing.split()[-1].lower()] for thing in things}
    most = sorted((thing for thing, n in named.items() if n >= 2), key=lambda thing: -named[thing])[:2]
    if not most or rng.random() < 0.1:
        return rng.choice(ANYTHING)
    return rng.choice(ASKED).format(rng.choice(most))


def facts() -> list[tuple[str, str]]:
    """Questions with one right answer, and that answer: of a teacher this small, half the answers are wrong."""
    kinds = json.loads(Path(__file__).with_name("lamb_facts.json").read_text())["kinds"]
    found = []
    for kind in kinds:
        for fact, (question, answer) in itertools.product(kind["facts"], kind["forms"]):
            filled = [form.format(*fact.split("|")) for form in (question, answer)]
            found.append((filled[0][0].upper() + filled[0][1:], filled[1][0].upper() + filled[1][1:]))
    return found


def talk(
    told: list[str], answers: list[dict[str, object]], slots: dict[str, list[str]], rng: random.Random, times: int
) -> list[dict[str, object]]:
    """Stories that were asked for, the teacher's answers but those that facts give, and the facts, which are short,
    so many `times`; shuffled."""
    things = slots["animal"] + slots["person"] + slots["name"] + [f"a {thing}" for thing in slots["thing"]]
    found = [_conversation(asked_for(story, things, rng), story) for story in told]
    asked = ((answer, answer["messages"][0]["content"]) for answer in answers)  # type: ignore[index]
    found += [{"messages": answer["messages"]} for answer, question in asked if not GIVEN.search(question)]
    found += [_conversation(*fact) for fact in facts()] * times
    rng.shuffle(found)
    return found


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    if not path.exists():
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answers", type=int, default=4096, help="questions to ask the teacher")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tuning-steps", type=int, default=350)
    parser.add_argument("--last-steps", type=int, default=300)
    options = parser.parse_args()
    out, data, threads = options.out, Path(os.environ["MERINO_DATA"]), ["--threads", str(options.threads)]
    out.mkdir(parents=True, exist_ok=True)

    told, rng = stories(data), random.Random(0)
    (out / "heldout.txt").write_text("\n\n".join(told[::40]))
    told = [story for k, story in enumerate(told) if k % 40]
    write_lines(out / "stories.jsonl", [{"text": story} for story in told])
    children = json.loads((prompts.FOLDER / "children.json").read_text())
    slots = children["slots"]
    children["groups"] = children["groups"][1:]  # the stories are better than the teacher's
    (out / "questions.json").write_text(json.dumps(children))

    if not (out / "teacher").exists():
        run("import", "smollm2-135m-instruct", "--out", out / "teacher")
    teacher = ["--temperature", "0.4", "--top-p", "0.9", "--frequency-penalty", "0.1", "--max-tokens", "100"]
    teacher += ["--count", str(options.answers), "--batch", "64", "--licence", "Apache-2.0"]
    run(
        "distill",
        "generate",
        out / "teacher",
        "--prompts",
        out / "questions.json",
        "--out",
        out / "answers.jsonl",
        *teacher,
        *threads,
    )
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]

    (out / "space.json").write_text(json.dumps(SPACE))
    if not (out / "lamb.json").exists():
        board = ["--board", "orin-nano-8gb", "--mode", "15W", "--precision", "int4", "--lengths", "256,512"]
        run("estimate", "--space", out / "space.json", *board, "--out", out / "table.jsonl")
        budget = ["--table", out / "table.jsonl", "--precision", "int4", *BUDGET]
        run("search", "--space", out / "space.json", *budget, "--out", out / "lamb.json")

    how = ["--optimizer", "muon", "--sequence", "512", "--batch", "8", "--micro-batch", "8", "--save-every", "200"]
    texts = ["--corpus", out / "stories.jsonl", "--corpus", out / "answers.jsonl"]
    train(
        out / "lamb.json",
        out / "pretrained",
        [*texts, *how, *threads, "--steps", options.steps, "--learning-rate", "3e-3"],
    )
    write_lines(out / "talk.jsonl", talk(told, answers, slots, rng, times=8))
    write_lines(out / "short.jsonl", talk(told[::4], answers, slots, rng, times=12))
    how += ["--learning-rate", "1e-3"]
    steps = ["--steps", options.tuning_steps]
    train(out / "pretrained", out / "tuned", ["--corpus", out / "talk.jsonl", *how, *threads, *steps])
    steps = ["--steps", options.last_steps]
    train(out / "tuned", out / "lamb", ["--corpus", out / "short.jsonl", *how, *threads, *steps])
    if not (out / "bundle").exists():
        run("export", out / "lamb", "--out", out / "bundle", "--precision", "int4")
    for model in ("lamb", "bundle"):
        run("evaluate", out / model, "--perplexity", out / "heldout.txt", "--out", out / f"{model}-perplexity.json")


def _conversation(request: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def train(model: Path, out: Path, how: list[object]) -> None:
    if (out / "training.json").exists() and not (out / "state").exists():
        return
    going_on = ["--continue"] if (out / "state").exists() else []
    run("train", model, "--out", out, *how, *going_on)


def run(verb: str, *words: object) -> None:
    subprocess.run([sys.executable, "-m", "merino_edge", verb, *map(str, words)], check=True)


if __name__ == "__main__":
    main()
