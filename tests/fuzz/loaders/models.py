"""What holds a model to train or convert: checkpoints, tokenizers, chat templates, Hugging Face folders, GGUF files."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from random import Random

import numpy as np
from fuzz.draft import Draft, Files, Loader, record, sign_file, text
from fuzz.honest import HELLO, PROMPT, TINY, content, files_of, save_checkpoint, tokenizer_json, written
from fuzz.json_changes import canonical, put, sha256
from fuzz.loaders.designs import show
from fuzz.tokenizer_form import TOKENIZER
from fuzz.weight_forms import GGUF, SAFETENSORS

from merino_edge import checkpoint
from merino_edge.architecture import Architecture
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_huggingface import export_to_huggingface
from merino_edge.data.bpe import CHATML_TEMPLATE, chat_format
from merino_edge.errors import InputError
from merino_edge.tokenizer import Tokenizer

# --- checkpoints -----------------------------------------------------------------------------------


def seal_checkpoint(made: Draft, folder: str = "") -> None:
    """Make the hashes of a checkpoint right: its architecture's id, its files', its own."""
    name = f"{folder}architecture.json"
    if name in made.structures and name not in made.written:
        document = made.structure(name)
        if isinstance(document, dict) and (text_of := canonical(document.get("architecture"))) is not None:
            put(document, ("id",), sha256(text_of)[:12])
        sign_file(made, name)
    for file in checkpoint.FILES:
        record(made, folder + file, f"{folder}training.json", ("files", file))
    sign_file(made, f"{folder}training.json")


def _use_checkpoint(folder: Path) -> None:
    loaded = checkpoint.load(folder)
    use_tokenizer(Tokenizer.load(folder))
    show(folder)
    json.dumps(loaded.training)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    """Encode, decode and chat, as every run does."""
    ids = tokenizer.encode(PROMPT)
    tokenizer.decode(ids)
    tokenizer.decode([0, tokenizer.vocab_size, 5], skip_special_tokens=False)
    assert tokenizer.sha256
    try:
        tokenizer.encode_chat(HELLO)
    except InputError:  # it has no template
        return


def _write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "chat.json").write_text(chat_format(conversations=True).to_json())


def _use_tokenizer(folder: Path) -> None:
    use_tokenizer(Tokenizer.load(folder))


# --- chat templates --------------------------------------------------------------------------------

TEMPLATE_WORDS = (
    *("{{ ", " }}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% else %}", "{% endif %}", "{# ", " #}"),
    *("{% set a = a ~ a %}", "{{ 'a' * 3 * 10**9 }}", "{% for i in range(10**9) %}", "{{ range(10**8) | list }}"),
    *("{{ '%1000000000d' | format(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages[0].content.x.y }}", "| tojson"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('no') }}", "{{ 10 ** 10 ** 7 }}"),
    *("{{ messages | map('upper') | join }}", "{{ namespace(a=1) }}", "{{ lipsum(n=10**6) }}", "{{ dict(a=1) }}"),
    *("{{ 'a'.center(10**9) }}", "{{ ('a' * 10**5) | batch(2) | list }}", "{% include 'x' %}", "{% import 'x' as y %}"),
    *("{{ cycler(1) }}", "{{ joiner() }}", "{{ 1 / 0 }}", "{{ x.y }}", "{{ 'é' | e }}", "{%- ", " -%}", "{% raw %}"),
    *("{{ 'a,' * 10**6 | replace(',', 'bbbbbbbbbb') }}", "{{ [1] * 10**9 }}", "{% call f() %}{% endcall %}", "not "),
    *("{{ messages | tojson(indent=10**9) }}", "{{ 'a' | indent(10**9) }}", "{{ 'x' | wordwrap(0) }}", "namespace"),
    *("{{ strftime_now('%Y') }}", "{{ ''.format_map }}", "{{ '{0:1000000000}'.format(1) }}", "{{ 1 | int(base=99) }}"),
)


def _write_template(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "template.jinja").write_text(CHATML_TEMPLATE)


@functools.cache
def _plain_tokenizer() -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json()), chat_format(conversations=True))


def _use_template(folder: Path) -> None:
    template = content(folder / "template.jinja").decode(errors="surrogateescape")
    chat = dataclasses.replace(chat_format(conversations=True), chat_template=template)
    tokenizer = Tokenizer(_plain_tokenizer().backend, chat)
    tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": ""}])


# --- models of others ------------------------------------------------------------------------------

SHAPES: dict[str, Architecture] = {
    "llama": dataclasses.replace(TINY, blocks=(dataclasses.replace(TINY.blocks[0], shared=False, layers=1),)),
}
SHAPES["gpt2"] = dataclasses.replace(
    SHAPES["llama"],
    norm="layernorm",
    ffn="gelu_tanh",
    positions="learned",
    rotary_dim=0,
    bias="all",
    blocks=(dataclasses.replace(SHAPES["llama"].blocks[0], kv_heads=2),),
)
SHAPES["qwen2"] = dataclasses.replace(SHAPES["llama"], bias="qkv")


def _write_huggingface(folder: Path, family: str) -> None:
    save_checkpoint(folder / "checkpoint", SHAPES[family])
    export_to_huggingface(folder / "checkpoint", folder / "model")


def _huggingface(family: str) -> Files:
    def write(folder: Path) -> None:
        _write_huggingface(folder, family)

    return {name: data for name, data in written(write).items() if name.startswith("model/")}


def _use_import(folder: Path, name: str) -> None:
    out = folder / "out"
    import_model(folder / name, out)
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def _write_gguf(folder: Path) -> None:
    import gguf

    a, file = SHAPES["llama"], gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    block = a.blocks[0]
    width, kv_width = block.width, block.kv_heads * a.head_dim
    numbers = {
        "context_length": 32,
        "block_count": 1,
        "embedding_length": width,
        "feed_forward_length": block.ffn_width,
    }
    numbers |= {"attention.head_count": block.heads, "attention.head_count_kv": block.kv_heads}
    file.add_float32("llama.rope.freq_base", 500.0)
    for key, value in numbers.items():
        file.add_uint32(f"llama.{key}", value)
    file.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    tokens = ["<s>", "</s>", *"abcdehlort", "Ġ", "he", "ll", "hell"]
    file.add_token_list(tokens)
    file.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    file.add_token_merges(["h e", "l l", "he ll"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    file.add_chat_template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("ffn_up.weight"):
            file.add_tensor(name, values.astype(np.float16))
        elif name.endswith("ffn_down.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            file.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            file.add_tensor(name, values)

    tensor("token_embd.weight", len(tokens), width)
    tensor("output_norm.weight", width)
    for name in ("attn_norm", "ffn_norm"):
        tensor(f"blk.0.{name}.weight", width)
    for name, out, into in (
        *(("attn_q", width, width), ("attn_k", kv_width, width), ("attn_v", kv_width, width)),
        *(("attn_output", width, width), ("ffn_down", width, block.ffn_width)),
        *(("ffn_gate", block.ffn_width, width), ("ffn_up", block.ffn_width, width)),
    ):
        tensor(f"blk.0.{name}.weight", out, into)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _rope(draft: Draft, rng: Random) -> bool:
    """Sometimes a field that other models have, with a value that they have."""
    if rng.random() > 0.1:
        return False
    fields = {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 0},
        "sliding_window": 16,
        "quantization_config": {"bits": 4},
        "tie_word_embeddings": rng.choice((True, False, 0)),
        "head_dim": rng.choice((8, 7, 16, None)),
        "eos_token_id": rng.choice(([1, 2], [], [2**31], -1, "2", [None])),
        "hidden_act": "gelu",
        "torch_dtype": "float8",
        "model_type": rng.choice(("opt", "gpt2", "gpt_neox", "qwen2", "mistral", "llama", "x")),
    }
    name = rng.choice(list(fields))
    put(draft.structure("model/config.json"), (name,), fields[name])
    return True


_WEIGHTS = {".safetensors": SAFETENSORS, "tokenizer.json": TOKENIZER}
LOADERS = (
    Loader(
        "checkpoint",
        functools.partial(written, lambda folder: [save_checkpoint(folder / "c"), _lift(folder / "c")]),
        _use_checkpoint,
        codecs=_WEIGHTS,
        seal=seal_checkpoint,
        weights={"model.safetensors": 2, "tokenizer.json": 0.5},
    ),
    Loader(
        "tokenizer",
        functools.partial(written, _write_tokenizer),
        _use_tokenizer,
        codecs=_WEIGHTS,
        weights={"tokenizer.json": 9},
    ),
    Loader(
        "template",
        functools.partial(written, _write_template),
        _use_template,
        codecs={".jinja": text(*TEMPLATE_WORDS)},
        weights={"tokenizer.json": 0},
    ),
    *(
        Loader(
            "huggingface" if family == "llama" else f"huggingface-{family}",
            functools.partial(_huggingface, family),
            functools.partial(_use_import, name="model"),
            codecs=_WEIGHTS,
            weights={"model/config.json": 3, "model/model.safetensors": 2},
            package="ml_dtypes",
            extra_step=_rope,
        )
        for family in SHAPES
    ),
    Loader(
        "gguf",
        functools.partial(written, _write_gguf),
        functools.partial(_use_import, name="m.gguf"),
        codecs={".gguf": GGUF},
        package="gguf",
    ),
)


def _lift(folder: Path) -> None:
    """Put the files of a folder into the one above it."""
    for name, data in files_of(folder).items():
        (folder.parent / name).write_bytes(data)
        (folder / name).unlink()
    folder.rmdir()
