"""Hugging Face import: computes, tokenizes and chats as transformers; unsupported models are refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from helpers.warm_python import warm_merino
from merino_edge import checkpoint, tokenizer
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_huggingface import export_to_huggingface
from merino_edge.errors import ArtefactError, InputError, MerinoError, OutputError, UnsupportedError
from merino_edge.pytorch.model import Model
from merino_edge.runtime.detokenizer import StreamingDetokenizer

VOCAB = 320
TEXT = "Hello world, 1984! naïve 日本語 \n\n  def f(x):\n\treturn x"
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_ROPE = {"rope_type": "default", "rope_theta": 500.0}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "opt": lambda: transformers.OPTConfig(**_OPT),
    "opt-post-projected": lambda: transformers.OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "opt-unbiased-untied": lambda: transformers.OPTConfig(**_OPT, enable_bias=False, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "cerebras": lambda: transformers.GPT2Config(**_GPT2, activation_function="gelu", n_inner=80),
    "neox": lambda: transformers.GPTNeoXConfig(**_NEOX),
    "neox-serial": lambda: transformers.GPTNeoXConfig(
        **_NEOX, use_parallel_residual=False, rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}
    ),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA, rope_parameters=_ROPE),
    "llama-tied": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama-biased": lambda: transformers.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=None),
}


def _tokenizer_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        [TEXT] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    return str(backend.to_str())


def _save(folder: Path, name: str = "llama", **settings: Any) -> Any:
    """A randomly initialised model in `folder`, as transformers saves it, with a tokenizer of `settings`."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that none can be lost unseen
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def _edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file. The value None removes a field."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def _largest_difference(model: Any, loaded: checkpoint.Checkpoint) -> float:
    """The largest difference of the logits, on two random sequences over all positions."""
    a = loaded.architecture
    tokens = torch.randint(0, a.vocab_size, (2, a.max_positions), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = model(tokens).logits - Model.from_weights(a, loaded.weights)(tokens)
    return float(difference.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = _save(tmp_path / "model", name)
    a = import_model(tmp_path / "model", tmp_path / "ckpt")
    loaded = checkpoint.load(tmp_path / "ckpt")
    assert loaded.architecture == a
    assert a.parameters == model.num_parameters()
    assert _largest_difference(model, loaded) <= 1e-4
    source = loaded.training["source"]
    assert source["format"] == "huggingface" and list(source["files"]) == ["model.safetensors"]


def test_older_configurations_mean_the_same(tmp_path: Path) -> None:
    spellings: dict[str, dict[str, Any]] = {
        "llama": {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        "neox-serial": {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 500},
    }
    for name, old in spellings.items():
        _save(tmp_path / name, name)
        new = import_model(tmp_path / name, tmp_path / "ckpt")
        _edit(tmp_path / name / "config.json", **old)
        assert import_model(tmp_path / name, tmp_path / "ckpt").id == new.id


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_half_precision_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _save(tmp_path / "model").to(dtype)
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    import_model(tmp_path / "model", tmp_path / "ckpt")
    loaded = checkpoint.load(tmp_path / "ckpt")
    assert {w.dtype for w in loaded.weights.values()} == {np.dtype(np.float32)}
    assert _largest_difference(model, loaded) <= 1e-4


def test_names_without_the_family_prefix_and_buffers(tmp_path: Path) -> None:
    """Weight names without prefix, and buffers, as in OpenAI's own GPT-2 file."""
    model = _save(tmp_path / "model", "gpt2")
    file = tmp_path / "model" / "model.safetensors"
    bare = {name.removeprefix("transformer."): w for name, w in load_file(file).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": bare["wte.weight"].clone()}, file)
    import_model(tmp_path / "model", tmp_path / "ckpt")
    assert _largest_difference(model, checkpoint.load(tmp_path / "ckpt")) <= 1e-4


TEMPLATE = "{{ bos_token }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}\n"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True},
        {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "chat_template": TEMPLATE},
        {"chat_template": "\n  " + TEMPLATE},
    ],
)
@pytest.mark.parametrize("prepends", [False, True])
def test_prompts_equal_those_of_transformers(prepends: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    _save(tmp_path / "model", **settings)
    backend = Tokenizer.from_str(_tokenizer_json())
    backend.enable_truncation(3)  # as some models ship theirs; transformers does not cut a prompt, nor do we
    if prepends:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    import_model(tmp_path / "model", tmp_path / "ckpt")
    ours, theirs = (
        tokenizer.Tokenizer.load(tmp_path / "ckpt"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    for text in (TEXT, "", "a</s>b<s>", " 12 \n"):
        assert ours.encode(text) == theirs(text).input_ids
    if "chat_template" in settings:
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        assert ours.apply_template(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_end_tokens_and_a_template_file(tmp_path: Path) -> None:
    _save(tmp_path / "model", chat_template="not this one")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    import_model(tmp_path / "model", tmp_path / "ckpt")
    chat = checkpoint.load(tmp_path / "ckpt").chat
    assert chat == tokenizer.ChatFormat((2, 5), None, "{{ messages[0].content }}")  # the tokenizer's own end first


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_stop_strings_end_an_answer_and_leave_with_the_model(place: str, tmp_path: Path) -> None:
    _save(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    path = tmp_path / "model" / place
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, "stop_strings": ["be", "xy"]}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.stop_strings
    import_model(tmp_path / "model", tmp_path / "ckpt")
    ours = tokenizer.Tokenizer.load(tmp_path / "ckpt")
    assert list(ours.chat.stop_strings) == theirs == ["be", "xy"]
    text = StreamingDetokenizer(ours, ["zz"])
    pieces = "".join(map(text.push, ours.encode("a bed"))) + text.finish()
    assert text.stopped and pieces == "a "
    export_to_huggingface(tmp_path / "ckpt", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["stop_strings"] == ["be", "xy"]
    path.write_text(json.dumps({**values, "stop_strings": ["be", ""]}))
    with pytest.raises(ArtefactError, match=f"{place}: stop_strings is not up to 32 texts"):
        import_model(tmp_path / "model", tmp_path / "again")


ALL_TOKENS = "".join(f"{{{{ {name}_token }}}}-" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image"))


@pytest.mark.parametrize("listed", [False, True])
def test_special_tokens_come_from_every_file(listed: bool, tmp_path: Path) -> None:
    """special_tokens_map.json counts where the settings list no added tokens, as in transformers; ends do always."""
    settings: dict[str, Any] = {"added_tokens_decoder": {}} if listed else {}
    settings |= {
        "pad_token": {"__type": "AddedToken", "content": "<unk>"},
        "image_token": "H",
        "unk_token": None,
        "mask_token": "m",
    }
    _save(
        tmp_path / "model", chat_template=ALL_TOKENS + "{{ messages[0].content }}{{ tools }}{{ documents }}", **settings
    )
    older = {"unk_token": "<unk>", "eos_token": {"content": "e", "lstrip": False}, "sep_token": "</s>"}
    (tmp_path / "model" / "special_tokens_map.json").write_text(json.dumps(older))
    _edit(tmp_path / "model" / "config.json", eos_token_id=[9])
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 7}')
    import_model(tmp_path / "model", tmp_path / "ckpt")
    ours = tokenizer.Tokenizer.load(tmp_path / "ckpt")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_template(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.chat.eos_token_ids[0] == theirs.eos_token_id
    assert set(ours.chat.eos_token_ids) == {7, 9, 2, ours.backend.token_to_id("e")}


def test_a_template_that_fails_is_refused_before_the_weights_and_can_be_replaced(tmp_path: Path) -> None:
    _save(tmp_path / "model", chat_template="{{ messages[0].content }}{{ raise_exception('not today') }}")
    read = list[int]()
    with pytest.raises(UnsupportedError, match="conversation: not today; give another: --chat-template FILE"):
        import_model(tmp_path / "model", tmp_path / "ckpt", lambda done, total: read.append(done))
    assert not read and not (tmp_path / "ckpt").exists()
    other, notes = "{{ bos_token }}{{ messages[-1].content }}", list[str]()
    import_model(tmp_path / "model", tmp_path / "ckpt", chat_template=other, on_note=notes.append)
    assert notes == ["the chat template leaves system messages out"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert tokenizer.Tokenizer.load(tmp_path / "ckpt").apply_template(messages) == "<s>hi"
    (tmp_path / "other.jinja").write_text("\n")
    _edit(tmp_path / "model" / "config.json", eos_token_id=None)
    _edit(tmp_path / "model" / "tokenizer_config.json", eos_token=None)
    import_model(tmp_path / "model", tmp_path / "none", chat_template="\n")
    assert checkpoint.load(tmp_path / "none").chat.chat_template is None


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "model_type", "mamba"),
        ("llama", "rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}),
        ("llama", "rope_scaling", {"type": "ntk"}),
        ("llama", "rope_scaling", {"rope_theta": 1e4, "mrope_section": [2], "zoom": 1}),
        ("llama", "hidden_act", "relu"),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "num_key_value_heads", 3),
        ("qwen2", "layer_types", ["full_attention", "linear_attention"]),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "activation_function", "quick_gelu"),
        ("neox", "attention_bias", False),
        ("opt", "layer_norm_elementwise_affine", False),
    ],
)
def test_what_the_architecture_cannot_spell_is_refused_by_name(
    family: str, field: str, value: Any, tmp_path: Path
) -> None:
    _save(tmp_path / "model", family)
    _edit(tmp_path / "model" / "config.json", **{field: value})
    word = {
        "rope_parameters": "factor|rope_type",
        "rope_scaling": "type 'ntk'|mrope_section, zoom is",
        "num_key_value_heads": "kv_heads",
    }.get(field, field)
    with pytest.raises(UnsupportedError, match=word):
        import_model(tmp_path / "model", tmp_path / "ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def _without(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def _changed_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _escaping_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    (folder.parent / "outside.safetensors").rename(folder / "inside.safetensors")


def _larger_tokenizer(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"<extra{i}>" for i in range(VOCAB)])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        (_without("config.json"), ArtefactError, "config.json does not exist"),
        (_without("tokenizer.json"), ArtefactError, "tokenizer.json is missing"),
        (_without("model.safetensors"), ArtefactError, "holds no model.safetensors"),
        (_pickled, UnsupportedError, "pytorch_model.bin is not safetensors"),
        (_truncated, ArtefactError, "cannot be read"),
        (_escaping_index, ArtefactError, "no file beside it"),
        (_larger_tokenizer, ArtefactError, "has no embedding"),
        (lambda f: (f / "config.json").write_text("{"), ArtefactError, "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ArtefactError, "not an object"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ArtefactError, "not a tokenizer"),
        (lambda f: _edit(f / "config.json", hidden_size="32"), ArtefactError, "hidden_size is '32', not int"),
        (lambda f: _edit(f / "config.json", hidden_size=None), ArtefactError, "hidden_size is missing"),
        (lambda f: _edit(f / "config.json", num_hidden_layers=3), ArtefactError, "no weight for blocks.0.layers.2"),
        (lambda f: _edit(f / "config.json", intermediate_size=40), ArtefactError, "does not give"),
        (lambda f: _edit(f / "generation_config.json", eos_token_id="x"), ArtefactError, "eos_token_id"),
        (lambda f: _edit(f / "tokenizer_config.json", chat_template="x" * 200_000), ArtefactError, "template over"),
        (_changed_weights(lambda w: w.update(extra=torch.ones(1))), UnsupportedError, "extra has no place"),
        (_changed_weights(lambda w: w.pop("lm_head.weight")), ArtefactError, "no weight for head.weight"),
        (_changed_weights(lambda w: w["model.norm.weight"].fill_(float("nan"))), ArtefactError, "NaN"),
        (
            _changed_weights(lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
            UnsupportedError,
            "not a float",
        ),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], Any], error: type[MerinoError], word: str, tmp_path: Path
) -> None:
    _save(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=word) as refusal:
        import_model(tmp_path / "model", tmp_path / "ckpt")
    assert "\n" not in str(refusal.value) and refusal.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_artefacts_are_refused_with_the_next_command(tmp_path: Path) -> None:
    _save(tmp_path / "model")
    import_model(tmp_path / "model", tmp_path / "ckpt")
    with pytest.raises(InputError, match="merino-edge show"):
        import_model(tmp_path / "ckpt", tmp_path / "other")


def test_an_untied_copy_of_a_tied_head_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "model", "llama-tied")
    _changed_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="differs from the embedding"):
        import_model(tmp_path / "model", tmp_path / "ckpt")


def test_command_line(tmp_path: Path) -> None:
    def run(source: str, *more: str, out: str = "ckpt") -> subprocess.CompletedProcess[str]:
        command = [warm_merino(), "import", source, *more, "--out", str(tmp_path / out), "--json"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    _save(tmp_path / "model", "gpt2")
    done = run(str(tmp_path / "model"))
    assert done.returncode == 0
    assert json.loads(done.stdout)["id"] == checkpoint.load(tmp_path / "ckpt").architecture.id
    again = run(str(tmp_path / "model"))
    assert again.returncode == OutputError.exit_code and "ckpt is a checkpoint already; add --force" in again.stderr
    assert run(str(tmp_path / "model"), "--force").returncode == 0
    refused = run("facebook/opt-125m", out="other")
    assert refused.returncode == InputError.exit_code and not refused.stdout
    assert refused.stderr.startswith("merino-edge: ") and refused.stderr.count("\n") == 1
