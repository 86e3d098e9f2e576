"""A model of a public shape and random weights: import, export as int4, chat. Memory and time of every command.

    python benchmarks/import_to_chat.py qwen3-0.6b [--out FOLDER] [--context 512] [--only-import]

The folder of Hugging Face is written by transformers' rules: bfloat16, in files of at most 2 GB. Its tokenizer is a
small one of its own, so most ids of the vocabulary have no text. "Peak" is the largest resident memory of a command and
of the processes that it started and waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
# Name -> (transformers' model_type, what the model's config.json says)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "qwen3",
        {
            **{"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
            **{"max_position_embeddings": 40_960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        },
    ),
    "gemma-3-1b": (
        "gemma3_text",
        {
            **{"vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
            **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
            "max_position_embeddings": 32_768,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            **{"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
            "max_position_embeddings": 131_072,
        },
    ),
    "qwen3-1.7b": (
        "qwen3",
        {
            **{"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
            **{"max_position_embeddings": 40_960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        },
    ),
    "smollm3-3b": (
        "smollm3",
        {
            **{"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36},
            **{"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True},
            "max_position_embeddings": 65_536,
        },
    ),
}


def write_folder(name: str, folder: Path) -> int:
    """A folder of Hugging Face with random weights, written a matrix at a time. Returns the number of parameters."""
    import torch
    import transformers

    from merino_edge.data.bpe import train_tokenizer

    kind, settings = SHAPES[name]
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **{**_LLAMA, **settings})
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model = model.to_empty(device="cpu")
    model.tie_weights()  # the new memory is not shared yet
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if "gemma" in kind and parameter_name.endswith("norm.weight") else 1.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, max_shard_size="2GB")
    (folder / "tokenizer.json").write_text(train_tokenizer(iter(["Hello world, 1984!"] * 9), 300).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return sum(parameter.numel() for parameter in model.parameters())


def timed(*arguments: str | Path) -> None:
    """Run a command of merino-edge and print its row."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "merino_edge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    processor_s = usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    peak_gib = usage.ru_maxrss / 2**20
    print(f"| {arguments[0]} | {code} | {seconds:.0f} | {processor_s:.0f} | {peak_gib:.2f} |", flush=True)
    if code:
        raise SystemExit(told[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, help="folder that stays; left out: a temporary one")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--only-import", action="store_true", help="end after the import")
    parser.add_argument("--only-write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_write:
        print(f"{write_folder(options.shape, options.out):,} parameters")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        command = [sys.executable, __file__, options.shape, "--only-write", "--out", folder / "origin"]
        if not (folder / "origin").exists():
            subprocess.run(command, check=True)
        print("| command | exit | seconds | seconds of processor | peak GiB |")
        print("|---|---|---|---|---|")
        timed("import", folder / "origin", "--out", folder / "checkpoint")
        if options.only_import:
            return
        timed(
            *("export", folder / "checkpoint", "--precision", "int4", "--context", str(options.context)),
            *("--out", folder / "bundle"),
        )
        timed("generate", folder / "bundle", "--prompt", "Hello", "--raw", "--greedy", "--max-tokens", "64")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
