"""llama.cpp through its C interface (llama_decode, greedy by numpy), so that no Python wrapper is on its bill."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]  # a peer, in an environment of its own
import numpy as np
from worker import serve

CONTEXT = 1024


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        self.model = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )
        self.context = self.model._ctx.ctx
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def run(self, tokens: list[int], start: int) -> int:
        return int(self.logits(tokens, start).argmax())

    def logits(self, tokens: list[int], start: int) -> Any:
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.model.n_vocab(),))


if __name__ == "__main__":
    serve(LlamaCpp)
