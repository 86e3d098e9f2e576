"""A target of atheris: coverage of our code guides the changes of one file of an artefact.

    pip install atheris
    python tests/fuzz/atheris_loader.py LOADER FILE [-max_total_time=3600 ...] [CORPUS_FOLDER]

An input is the file's content. The changes are those of benchmarks/fuzz.py, and hashes are made right before the loader
sees the files. Any error that is not typed ends the run; libFuzzer keeps its input.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "tests")
sys.path.insert(1, str(ROOT))

with atheris.instrument_imports(include=["merino_edge"]):
    from fuzz.draft import Draft
    from fuzz.every_loader import LOADERS
    from fuzz.runner import Runner
    from fuzz.watch import Silent, Watch

    from merino_edge.errors import MerinoError


def main() -> None:
    loader, file = LOADERS[sys.argv[1]], sys.argv[2]
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    runner = Runner(loader, scratch, Watch(scratch))
    codec = loader.codec(file)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        try:
            changed = bytes(codec.encode(codec.step(codec.decode(data), Random(seed))))
        except Exception:  # it has no form any more
            changed = bytes(atheris.Mutate(data, max_size))
        return changed[:max_size]

    def use(data: bytes) -> None:
        made = Draft(loader, runner.honest)
        try:
            made.structures[file] = codec.decode(data)
        except Exception:
            made.written[file] = data
        loader.seal(made)
        for name, content in made.changes().items():
            (runner.folder / name).write_bytes(content or b"")
        with contextlib.redirect_stdout(Silent()), contextlib.suppress(MerinoError):
            loader.use(runner.folder)
        if set(runner._present()) != set(runner.honest):
            runner.lay_out()

    corpus = scratch / "corpus"
    corpus.mkdir()
    (corpus / "honest").write_bytes(runner.honest[file])
    words = [sys.argv[0], *sys.argv[3:], str(corpus), "-max_len=200000", "-timeout=5", "-rss_limit_mb=1500"]
    atheris.Setup(words, use, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
