"""The GGUF's weights as a folder of transformers: python to_huggingface.py MODEL.gguf FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # It has taken the weights apart into float32, and yet refuses to write what came from a quantised file.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
