"""How many of lamb's questions with one right answer it answers with exactly that, greedily; and what it says else.

python benchmarks/models/lamb_answers.py [BUNDLE]
"""

from __future__ import annotations

import contextlib
import sys

from train_lamb import facts

from merino_edge.runtime.chat import Chat
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling


def main() -> None:
    engine, tokenizer, _ = open_engine(sys.argv[1] if len(sys.argv) > 1 else "lamb", 1, cpu=True)
    asked = dict[str, set[str]]()
    for question, answer in facts():  # some have several
        asked.setdefault(question, set()).add(answer)
    right = 0
    with contextlib.closing(engine):
        for question, answers in asked.items():
            talk = Chat(engine, tokenizer, Sampling(greedy=True), 40)
            said = "".join(talk.send(question)).strip()
            right += said in answers
            if said not in answers:
                print(f"{question} {said}")
    print(f"{right} of {len(asked)} right")


if __name__ == "__main__":
    main()
