"""Prompt lookup beside the peers' plain decoding, on the rewriting prompts of guesses.py, as many tokens by everyone.

    python benchmarks/peers/lookup.py [--rounds 7] [--threads 2]        # after compare.py has installed and exported

In each round every program answers every prompt in turn, greedily, ours with draft tokens, and rests between. It prints
tokens per second of decoding, as medians over rounds with their spread (1.4826 MAD). It also prints how many times as
fast ours are as each peer, round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

from compare import HERE, OURS, PEERS, REST_SECONDS, Process, prepare, python_of

from merino_edge.convert.pretrained import fetch_smollm2
from merino_edge.latency.measurement import spread_percent
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.speculative.prompt_lookup import PromptLookup

sys.path.insert(0, str(HERE.parent))
from guesses import answer, prompts

RIVALS = ("llama.cpp", "onnxruntime-genai")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=160)
    options = parser.parse_args()
    environments = options.environments.resolve()
    models = prepare(environments, environments / "models", RIVALS, fetch_smollm2())
    speeds: dict[str, list[float]] = {name: [] for name in (*OURS, *RIVALS)}
    with contextlib.ExitStack() as stack:
        engines = {name: open_engine(models[name], options.threads) for name in OURS}
        rivals = {}
        for name in RIVALS:
            rival = Process(python_of(environments, name), PEERS[name].script, models[name], options.threads)
            rivals[name] = stack.enter_context(contextlib.closing(rival))
        for number in range(-1, options.rounds):  # the first warms up
            steps, took_ms = (dict.fromkeys(speeds, 0.0) for _ in range(2))
            for prompt in prompts()["rewriting"]:
                for name, (engine, tokenizer, _) in engines.items():
                    time.sleep(REST_SECONDS)
                    made = answer(engine, tokenizer, prompt, PromptLookup(), options.max_tokens).statistics
                    steps[name] += made.generated_tokens - 1
                    took_ms[name] += made.decode_ms
                ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
                for name, rival in rivals.items():
                    time.sleep(REST_SECONDS)
                    new = made.generated_tokens - 1
                    steps[name] += new
                    took_ms[name] += rival.ask(do="run", prompt=ids, new=new)["decode_ms"]
            for name, found in speeds.items():
                if number >= 0:
                    found.append(1e3 * steps[name] / took_ms[name])
        for engine, _, _ in engines.values():
            engine.close()
    for name, found in speeds.items():
        print(f"{name:<32} {statistics.median(found):6.1f} tokens/s, spread {spread_percent(found):.1f} %")
    for name in OURS:
        for rival in RIVALS:
            ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds[rival], strict=True)]
            print(
                f"{name} with lookup: {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) {rival}"
            )


if __name__ == "__main__":
    main()
