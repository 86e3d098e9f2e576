"""transformers in float32, eager, with a cache that grows, as its `generate` runs it by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from worker import serve


class Transformers:
    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.cache: Any = None

    def run(self, tokens: list[int], start: int) -> int:
        return int(self.logits(tokens, start).argmax())

    def logits(self, tokens: list[int], start: int) -> Any:
        if start == 0:
            self.cache = transformers.DynamicCache()
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].numpy()


if __name__ == "__main__":
    serve(Transformers)
