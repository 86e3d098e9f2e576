"""Runs the same commands with two versions of merino-edge and compares exit codes and artefacts, byte for byte.

    python benchmarks/artefacts_unchanged.py OLD_PYTHON NEW_PYTHON [--gguf FILE] [--work DIR] [--only TEXT]

Each version runs in an empty folder and an environment without the user's variables, on one thread. A row is printed
for each command and each file. A file that differs is read as JSON, or as safetensors, and compared value by value.
Only these differences are excused, and each is named: the fields of TIME_FIELDS, hashes of files that differ in such
fields alone, and the order of safetensors' metadata, which is random. Texts for people are not compared. Measurements
(profile, bench) are left out. The exit code is 1 if anything else differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Fields that hold a time or a speed of the run. mfu: model FLOPs utilisation, from the speed.
TIME_FIELDS = {"seconds", "train_seconds", "tokens_per_second", "mfu", "modified_ns"}
TIMEOUT_S = 900
ORIN = "estimate --board orin-nano-8gb --mode 15W"
DEMO = "--space demo --table demo.jsonl"
TRAIN = "train demo.json --corpus corpus.txt --batch 4 --sequence 32 --learning-rate 3e-3 --seed 5 --threads 1"
PROGRAM = "from merino_edge.cli.main import main; main()"  # old versions have no merino_edge.__main__
# A verb that has a new name, by its old one.
RENAMED = {"write": "distill generate", "teach": "distill logits"}

# (command by the old verbs, exit code). What `--json` prints is compared too, and so is what `generate` prints.
COMMANDS: list[tuple[str, int]] = [
    ("targets --json", 0),
    ("estimate --check --json", 0),
    (f"{ORIN} --space demo --precision int4 --quick --out demo.jsonl", 0),
    (f"{ORIN} --space paper --precision int8 --quick --out paper.jsonl --json", 0),
    (f"search {DEMO} --decode-ms 1 --params 3M --precision int4 --out demo.json --json", 0),
    (f"search {DEMO} --text-ms 30 --first-token-ms 50@300 --out text.json --json", 0),
    ("search --space paper --flops 60G --params 60M --out paper.json --json", 0),
    ("search --space paper --table paper.jsonl --decode-ms 20 --kv-mb 40 --out paper-ms.json --json", 0),
    ("search --space edge --weight-mb 40@int4 --kv-mb 16 --peak-mb 90 --out edge.json --json", 0),
    ("search --space paper --score parameters --flops 60G --out parameters.json --json", 0),
    ("search --space paper --flops 60G --solver evolution --iterations 2000 --seed 3 --out evolved.json --json", 0),
    ("search --from paper.json --out again.json", 0),
    ("search --space paper --flops 1 --out impossible.json", 4),
    (f"pareto {DEMO} --against decode_ms --points 6 --out front.json --html front.html --json", 0),
    ("pareto --space paper --against flops --points 5 --out paper-front.json --json", 0),
    (f"{TRAIN} --steps 8 --out checkpoint", 0),
    (f"{TRAIN} --steps 4 --optimizer muon --ema 0.9 --z-loss 1e-4 --out muon", 0),
    ("tokenize corpus.txt --tokenizer checkpoint --out tokens", 0),
    ("teach checkpoint --corpus tokens --out logits --window 32 --top-k 8 --precision fp32 --threads 1", 0),
    (f"{TRAIN} --steps 4 --teacher checkpoint --out student", 0),
    ("write checkpoint --prompts prompts.txt --plain --max-tokens 8 --seed 1 --precision fp32 --threads 1 "
     "--out written.jsonl", 0),
    ("export checkpoint --precision fp32 --context 64 --threads 1 --out fp32 --json", 0),
    ("export checkpoint --precision int8 --context 64 --threads 1 --out int8 --json", 0),
    ("export checkpoint --precision int4 --context 64 --threads 1 --out int4 --json", 0),
    ("export checkpoint --precision int4 --cache int8 --context 64 --threads 1 --out cache --json", 0),
    ("export checkpoint --precision fp16 --context 32,64 --target jetpack-6.2 --threads 1 --out trt --json", 0),
    ("export checkpoint --precision int4 --context 64 --target jetpack-7.2 --threads 1 --out native --json", 0),
    ("export-hf checkpoint --out hf", 0),
    ("import hf --out imported", 0),
    ("generate fp32 --raw --greedy --prompt One --max-tokens 16 --threads 1", 0),
    ("generate int8 --raw --seed 7 --temperature 1 --prompt One --max-tokens 16 --threads 1", 0),
    ("generate int4 --raw --greedy --lookup --prompt One --max-tokens 16 --threads 1", 0),
    ("generate cache --raw --greedy --prompt One --max-tokens 16 --threads 1", 0),
    # Of lamb, whose answers have words; the models above have seen too little text.
    ("generate --seed 3 --prompt 'Tell me a story about a dog.' --max-tokens 24 --threads 1", 0),
    ("generate --raw --greedy --prompt 'Once upon a time' --max-tokens 40 --threads 1", 0),
    ("generate --raw --greedy --lookup --prompt 'The dog saw the dog and the dog' --max-tokens 40 --threads 1", 0),
    ("generate --seed 7 --top-k 5 --repetition-penalty 1.2 --prompt 'Who are you?' --max-tokens 40 --threads 1", 0),
    ("generate nowhere --prompt One", 3),
    *((f"show {artefact} --json", 0) for artefact in ("demo.jsonl", "demo.json", "checkpoint", "int4", "tokens")),
    ("search --space nothing --out x.json", 2),
]  # fmt: skip
WITH_GGUF = ["import {gguf} --out pretrained --json", "show pretrained --json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="the interpreter of the old version's environment")
    parser.add_argument("new", type=Path, help="the interpreter of the new version's environment")
    parser.add_argument("--gguf", type=Path, help="a model to import")
    parser.add_argument("--work", type=Path, help="an empty folder to keep; without it a temporary one")
    parser.add_argument("--only", default="", help="run only the commands that contain this text")
    options = parser.parse_args()
    commands = [(command, code) for command, code in COMMANDS if options.only in command]
    if options.gguf:
        commands += [(command.format(gguf=options.gguf.resolve()), 0) for command in WITH_GGUF]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        old, new = work / "old", work / "new"
        for folder in (old, new):
            folder.mkdir(parents=True)
            (folder / "corpus.txt").write_text(corpus())
            (folder / "prompts.txt").write_text("One day the cat\nThe small boat\n")
        # The interpreter is not resolved: a virtual environment's is a link.
        failed = compare_exit_codes(commands, {old: options.old.absolute(), new: options.new.absolute()})
        failed += compare_files(old, new)
    print(f"{len(commands)} commands, {failed} unexplained differences")
    sys.exit(failed > 0)


def corpus() -> str:
    """Simple sentences, always the same."""
    rng = random.Random(0)
    who, did = ["The cat", "A boy", "The small boat", "Her friend"], ["saw", "found", "liked", "carried"]
    what = ["a red ball", "the old house", "some bread", "two birds"]
    lines = [f"{rng.choice(who)} {rng.choice(did)} {rng.choice(what)}.\n" for _ in range(3000)]
    return "".join(lines)


def compare_exit_codes(commands: list[tuple[str, int]], pythons: dict[Path, Path]) -> int:
    """Run each command in both folders and print a row for it; return how many do not end as expected."""
    failed = 0
    for number, (command, expected) in enumerate(commands):
        codes = [run(command, python, folder, number) for folder, python in pythons.items()]
        is_same = codes == [expected, expected]
        failed += not is_same
        print(f"{'equal' if is_same else 'DIFFERENT':<9} exit codes {codes[0]} {codes[1]}  {command}", flush=True)
    return failed


def run(command: str, python: Path, folder: Path, number: int) -> int:
    """Run one command, keep what it printed beside its artefacts, and return its exit code."""
    arguments = shlex.split(command)
    printed = folder / "printed"
    printed.mkdir(exist_ok=True)
    variables = {
        "HOME": str(folder / "home"),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    if arguments[0] in RENAMED and knows(python, RENAMED[arguments[0]], folder, variables):
        arguments[:1] = RENAMED[arguments[0]].split()
    done = subprocess.run(
        [str(python), "-c", PROGRAM, *arguments],
        cwd=folder, env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    is_compared = "--json" in arguments or arguments[0] == "generate"
    if is_compared:
        suffix = "json" if "--json" in arguments else "txt"
        (printed / f"{number:02}-{arguments[0]}.{suffix}").write_bytes(done.stdout)
    (folder / "home").mkdir(exist_ok=True)
    (folder / "home" / f"{number:02}.log").write_bytes(done.stderr)
    return done.returncode


def knows(python: Path, verb: str, folder: Path, variables: dict[str, str]) -> bool:
    """Whether a version has this verb. Python looks in its working folder first: a checkout would be the wrong one."""
    command = [str(python), "-c", PROGRAM, *verb.split(), "--help"]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True).returncode == 0


def compare_files(old: Path, new: Path) -> int:
    """Print a row for each file of either folder; return how many differ beyond what is excused."""
    names = sorted(
        {
            str(file.relative_to(folder))
            for folder in (old, new)
            for file in folder.rglob("*")
            if file.is_file() and file.relative_to(folder).parts[0] != "home"
        }
    )
    excused_hashes: dict[str, str] = {}
    for _ in names:  # a file may hold the hash of one that is compared later
        before = len(excused_hashes)
        rows = [(name, *compare_file(old / name, new / name, excused_hashes)) for name in names]
        if len(excused_hashes) == before:
            break
    for name, verdict, detail in rows:
        print(f"{verdict:<9} {detail}  {name}")
    return sum(verdict == "DIFFERENT" for _, verdict, _ in rows)


def compare_file(old: Path, new: Path, excused_hashes: dict[str, str]) -> tuple[str, str]:
    """A verdict and its reason. Hashes of a file that is excused are added to `excused_hashes`."""
    if not old.exists() or not new.exists():
        return "DIFFERENT", f"only the {'old' if old.exists() else 'new'} version wrote it"
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (old, new)]
    if hashes[0] == hashes[1]:
        return "equal", hashes[0][:12]
    try:
        pairs = list(zip(documents(old), documents(new), strict=True))
    except ValueError:
        return "DIFFERENT", " ".join(short[:12] for short in hashes)
    excused: set[str] = set()
    others = [line for pair in pairs for line in differences(*pair, "", excused, excused_hashes)]
    if others:
        return "DIFFERENT", "; ".join(others[:8])
    excused_hashes[hashes[0]] = hashes[1]
    return "equal", f"but for {', '.join(sorted(excused)) or 'the order of keys'}"


def documents(file: Path) -> list[Any]:
    """A file's JSON documents, one a line in .jsonl; of safetensors header and hash. Raises ValueError for others."""
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return [json.loads(data[8:end]), hashlib.sha256(data[end:]).hexdigest()]
    text = file.read_text(encoding="utf-8")
    if file.name == "verified.json":  # it holds each file's size and time of modification
        document = json.loads(text)
        files = {name: {"bytes": size, "modified_ns": time} for name, (size, time) in document["files"].items()}
        return [{**document, "files": files}]
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]


def differences(old: Any, new: Any, where: str, excused: set[str], excused_hashes: dict[str, str]) -> list[str]:
    """The paths whose values differ and are not excused. The names of excused fields are added to `excused`."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        lines, inside = [], set[str]()
        for key in old:
            if key in TIME_FIELDS and old[key] != new[key]:
                inside.add(key)
            elif key != "sha256":
                lines += differences(old[key], new[key], f"{where}.{key}", inside, excused_hashes)
        if old.get("sha256") != new.get("sha256"):
            # The object's own hash, where the rest is equal but for what is excused; or the hash of such a file.
            if lines or not (inside or excused_hashes.get(old["sha256"]) == new["sha256"]):
                lines.append(f"{where}.sha256")
            else:
                inside.add("sha256")
                excused_hashes[old["sha256"]] = new["sha256"]
        excused |= inside
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, pair in enumerate(zip(old, new, strict=True))
            for line in differences(*pair, f"{where}[{i}]", excused, excused_hashes)
        ]
    if isinstance(old, str) and excused_hashes.get(old) == new:
        excused.add("the hash of such a file")
        return []
    return [where]


if __name__ == "__main__":
    main()
