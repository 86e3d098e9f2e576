"""Random results of searches, each checked, and an alteration of each, which must be refused.

    OMP_NUM_THREADS=1 python benchmarks/check_certificates.py --results 1000

Spaces, budgets, scores, tables, targets and precisions are random. Every alteration is checked twice: as it is, where
the hash is wrong, and with its hash made anew. The report says how many of each kind are refused by the hash alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.random_results import ALTERATIONS, altered, document_of, random_result, signed
from merino_edge.architecture import Architecture
from merino_edge.search.check_certificate import Refused, check, users_function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    names = list(ALTERATIONS)
    seen: Counter[str] = Counter()
    wrong, seconds, mathematics, hashed = [], 0.0, Counter(), Counter()
    accepted = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        while accepted < options.results or refused < options.results:
            result = random_result(rng, Path(folder))
            document = document_of(result)
            if document["certificate"]["bound"] is None:
                continue  # nothing is claimed
            function = users_function(document["score"], document["score"]["name"])

            def verdict(one: dict[str, object], function: object = function) -> str:
                try:
                    check(one, function, Architecture.from_dict)
                except Refused as refusal:
                    return str(refusal)
                return ""

            began = time.process_time()
            told = verdict(document)
            seconds += time.process_time() - began
            seen[document["score"]["name"].rpartition("/")[2]] += 1
            seen[
                f"solver {document['solver']}, gap {'0' if document['certificate']['gap_percent'] == 0 else 'above 0'}"
            ] += 1
            seen[f"{len(document['budgets'])} budgets"] += 1
            seen["with a table" if document["table"] else "without a table"] += 1
            if told:
                wrong.append(f"refused: {document['score']['name']} {document['budgets']}: {told}")
            else:
                accepted += 1
            name = min(rng.sample(names, len(names)), key=lambda n: mathematics[n] + hashed[n])
            other = altered(name, document, rng, result)
            if other is None or refused >= options.results:
                continue
            if not verdict(other):
                wrong.append(f"accepted with a wrong hash: {name}")
            elif verdict(signed(other)):
                mathematics[name] += 1
                refused += 1
            else:
                hashed[name] += 1
                refused += 1
                if ALTERATIONS[name][1]:
                    wrong.append(f"accepted with a new hash: {name}: {document['score']['name']} {document['budgets']}")
            if accepted % 100 == 0:
                print(f"{accepted} accepted, {refused} refused, {len(wrong)} wrong", file=sys.stderr, flush=True)
    each = f"{seconds / max(1, accepted):.3f} processor seconds each"
    print(f"{accepted} results accepted, {each}; {refused} altered ones refused")
    for name in names:
        print(f"  {name}: {mathematics[name]} refused by what they claim, {hashed[name]} by the hash alone")
    print("  results:", dict(sorted(seen.items())))
    print("\n".join(wrong) if wrong else "nothing was wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
