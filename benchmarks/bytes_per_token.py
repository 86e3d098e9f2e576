"""How many bytes of English text a token stands for: MERINO_DATA=DIR python benchmarks/bytes_per_token.py

It trains byte-level BPE tokenizers as `merino-edge train` would, on WikiText-2, TinyStories and nine tenths of the
novels. Then it counts the tokens of text that they have not seen: WikiText-2's test set, the last tenth of the
stories and the last ten novels, one megabyte of each at most. The figures stand in the built-in spaces
(search/builtin_spaces.py).
"""

from __future__ import annotations

import lzma
import os
import sys
import tarfile
from pathlib import Path

from merino_edge.data.bpe import train_tokenizer

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 49152, 50272)
HELD_OUT_BYTES = 10**6


def texts(folder: Path) -> tuple[list[str], dict[str, str]]:
    """(training texts, held-out text by source)"""
    names = ("wikitext2_train", "wikitext2_test", "tinystories_train_head_2MiB")
    train, test, stories = (lzma.decompress((folder / f"{name}.txt.xz").read_bytes()).decode() for name in names)
    cut = stories.rindex("<|endoftext|>", 0, len(stories) * 9 // 10)
    with tarfile.open(folder / "english_novels_97.tar.xz") as archive:
        members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
        novels = [archive.extractfile(m).read().decode("utf-8", "replace") for m in members]  # type: ignore[union-attr]
    pieces = [novel[i : i + 2**16] for novel in novels[:-10] for i in range(0, len(novel), 2**16)]
    unseen = {"wikitext-2": test, "tinystories": stories[cut:], "novels": "".join(n[:100_000] for n in novels[-10:])}
    return [train, stories[:cut], *pieces], unseen


def main() -> None:
    if "MERINO_DATA" not in os.environ:
        sys.exit("set MERINO_DATA to the folder of corpora")
    training, unseen = texts(Path(os.environ["MERINO_DATA"]) / "lm")
    unseen = {name: text.encode()[:HELD_OUT_BYTES].decode(errors="ignore") for name, text in unseen.items()}
    print("tokens", *unseen, "mean", sep="\t")
    for size in SIZES:
        tokenizer = train_tokenizer(iter(training), size)
        rates = [len(text.encode()) / len(tokenizer.encode(text).ids) for text in unseen.values()]
        print(size, *(f"{rate:.3f}" for rate in (*rates, sum(rates) / len(rates))), sep="\t", flush=True)


if __name__ == "__main__":
    main()
