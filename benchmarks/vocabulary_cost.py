"""What a head of fewer tokens costs SmolLM2-135M-Instruct on a text: perplexity, and tokens that cannot be said.

    MERINO_DATA=DIR python benchmarks/vocabulary_cost.py --tokens 20480 [--keep FILE]

The head keeps the tokens of `--keep` (WikiText-2's training text), of special tokens and of bytes, as
`merino-edge export --keep-vocab` has it; windows of 1024 tokens of WikiText-2's test text, in PyTorch at fp32. A word
whose token is gone would be spelled in smaller ones, which is not counted here: perplexity is of the positions whose
token was kept. Milliseconds saved stand in every such export's report.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from wikitext2 import WINDOW, corpora, windows_of_test_text

from merino_edge import checkpoint
from merino_edge.convert.import_model import import_model
from merino_edge.convert.pretrained import fetch_smollm2
from merino_edge.data.corpus import pieces
from merino_edge.export.vocabulary_pruning import pruned_vocab
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20 * WINDOW)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    data = corpora()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        import_model(fetch_smollm2(), path)
        source, tokenizer = checkpoint.load(path), Tokenizer.load(path)
        a = source.architecture
        kept = pruned_vocab(tokenizer, pieces(options.keep or data / "wikitext2_train.txt.xz"), a.vocab_size)
        tokens = windows_of_test_text(tokenizer, options.tokens)
        model, known = Model.from_weights(a, dict(source.weights)).eval(), torch.zeros(a.vocab_size, dtype=torch.bool)
        known[torch.from_numpy(kept)] = True
        whole = few = count = seen = 0.0
        with torch.inference_mode():
            for window in torch.from_numpy(tokens):
                logits, targets = model(window[None])[0, :-1], window[1:]
                mine = known[targets]
                whole += float(F.cross_entropy(logits[mine], targets[mine], reduction="sum"))
                fewer = logits.masked_fill(~known, -torch.inf)[mine]
                few += float(F.cross_entropy(fewer, targets[mine], reduction="sum"))
                count, seen = count + int(mine.sum()), seen + len(targets)
    print(f"{len(kept)} of {a.vocab_size} tokens kept; {100 * (1 - count / seen):.2f} % of the text's cannot be said")
    before, after = math.exp(whole / count), math.exp(few / count)
    print(f"perplexity of the others {before:.3f} with all tokens, {after:.3f} with these")


if __name__ == "__main__":
    main()
