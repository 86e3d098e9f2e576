"""onnxruntime-genai over its own builder's int4 model; it picks the likeliest token itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai  # pyright: ignore[reportMissingImports]  # a peer, in an environment of its own
from worker import serve

CONTEXT = 1024


class GenAi:
    def __init__(self, path: Path, threads: int) -> None:
        settings = path / "genai_config.json"
        config = json.loads(settings.read_text())
        options = config["model"]["decoder"]["session_options"]
        if options.get("intra_op_num_threads") != threads:
            options["intra_op_num_threads"] = threads
            settings.write_text(json.dumps(config))
        self.vocabulary = config["model"]["vocab_size"]
        self.model = genai.Model(str(path))
        self.generator: Any = None
        self.version = f"onnxruntime-genai {genai.__version__}"

    def run(self, tokens: list[int], start: int) -> int:
        """After the first step the token is the one it chose itself, which it has appended already."""
        if start == 0:
            self._begin(tokens)
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def logits(self, tokens: list[int], start: int) -> Any:
        if start == 0:
            self._begin(tokens)
        else:
            self.generator.append_tokens(tokens)
        return self.generator.get_logits().reshape(-1)[-self.vocabulary :]

    def _begin(self, tokens: list[int]) -> None:
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self.generator = genai.Generator(self.model, parameters)
        self.generator.append_tokens(tokens)


if __name__ == "__main__":
    serve(GenAi)
