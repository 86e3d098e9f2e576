"""Every verb that reads artefacts: with damaged, foreign and malicious ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from helpers.stranger import TINY, Refused, commands, run, train
from merino_edge import artefact

FILES = [
    "a.json",
    "space.json",
    "table.jsonl",
    "result.json",
    *(f"checkpoint/{name}" for name in ("training.json", "architecture.json", "chat.json", "tokenizer.json")),
    "checkpoint/model.safetensors",
    *(f"bundle/{name}" for name in ("manifest.json", "model.onnx", "model.onnx.data", "tokenizer.json", "chat.json")),
]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "flipped bit": flip,
    "foreign": lambda data: b'{"hello": 1}',
    "no object": lambda data: b"[1, 2]",
    "binary": lambda data: bytes(range(256)),
    "pickle": lambda data: pickle.dumps({"weights": 1}),
    "deep": lambda data: b"[" * 100_000,
    "huge number": lambda data: b'{"kind": 1' + b"0" * 9999 + b"}",
    "lone surrogate": lambda data: b'{"kind": "\\ud800"}',
}


def copied(good: Path, name: str, folder: Path) -> Path:
    """Copy the artefact of the file `name` into `folder`. Returns the copied file."""
    top = name.split("/")[0]
    if "/" in name:
        shutil.copytree(good / top, folder / top)
    else:
        shutil.copy(good / top, folder / top)
    return folder / name


def reseal(path: Path, **changes: Any) -> None:
    """Change a JSON artefact and give it a correct hash, as its maker could."""
    body = {key: value for key, value in {**json.loads(path.read_text()), **changes}.items() if key != "sha256"}
    path.write_text(json.dumps({**body, "sha256": artefact.sha256_text(artefact.canonical_json(body))}))


def vouch(file: Path) -> None:
    """Write the present hash of `file` into the manifest beside it."""
    manifest = next(p for p in (file.parent / "manifest.json", file.parent / "training.json") if p.exists())
    files, sha256 = json.loads(manifest.read_text())["files"], artefact.sha256_file(file)
    entry = {"sha256": sha256, "bytes": file.stat().st_size} if manifest.name == "manifest.json" else sha256
    reseal(manifest, files={**files, file.name: entry})


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_by_every_reader(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    file = copied(good, name, tmp_path)
    data = file.read_bytes()
    readers = commands(good, tmp_path, tmp_path / "out")[name.split("/")[0]]
    for damage in DAMAGES.values():
        file.write_bytes(damage(data))
        for arguments in readers:
            refused(*arguments)
    file.write_bytes(data[: len(data) // 2])
    for arguments in readers if name != "table.jsonl" else readers[:1]:  # `show` explains an unfinished table
        refused(*arguments)
    file.unlink()
    for arguments in readers:
        assert str(file) in refused(*arguments) or name.endswith(("training.json", "manifest.json"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_plain_file_is_not_opened(
    good: Path, tmp_path: Path, refused: Refused, name: str, kind: str
) -> None:
    """Reading a pipe would wait for ever, and reading /dev/zero would fill the memory."""
    file = copied(good, name, tmp_path)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    for arguments in commands(good, tmp_path, tmp_path / "out")[name.split("/")[0]]:
        refused(*arguments)


@pytest.mark.parametrize("name", ["a.json", "space.json", "checkpoint/training.json", "bundle/manifest.json"])
def test_newer_schemas_and_false_hashes(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    file = copied(good, name, tmp_path)
    readers = commands(good, tmp_path, tmp_path / "out")[name.split("/")[0]]
    whole = file.read_text()
    reseal(file, schema_version=3)
    assert all("run: pip install -U merino-edge" in refused(*arguments) for arguments in readers)
    file.write_text(whole.replace('"sha256": "', '"sha256": "0', 1) if name == "a.json" else whole)
    reseal(file, kind="poem")
    assert all("poem" in refused(*arguments) for arguments in readers)
    file.write_text(json.dumps({**json.loads(whole), "sha256": "0" * 64}))
    assert all("does not match its own sha256" in refused(*arguments) for arguments in readers)
    if "/" in name:  # the program writes it, so it always has a hash
        file.write_text(whole.replace('"sha256": "' + json.loads(whole)["sha256"], '"sha257": "'))
        assert all("does not match its own sha256" in refused(*arguments) for arguments in readers)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("checkpoint/", "bundle/"))][1:])
def test_files_that_the_manifest_vouches_for_are_still_checked(
    good: Path, tmp_path: Path, refused: Refused, name: str
) -> None:
    file = copied(good, name, tmp_path)
    if file.name == "manifest.json":
        for path in ("../secret", "/etc/passwd", "model.onnx/../chat.json"):
            reseal(file, files={**json.loads(file.read_text())["files"], path: {"sha256": "0", "bytes": 1}})
            assert "not a plain file" in refused(*commands(good, tmp_path, tmp_path / "out")["bundle"][0])
        return
    data = file.read_bytes()
    for damage in (DAMAGES["empty"], DAMAGES["binary"], DAMAGES["foreign"], DAMAGES["pickle"], DAMAGES["deep"]):
        file.write_bytes(damage(data))
        vouch(file)
        refused(*commands(good, tmp_path, tmp_path / "out")[name.split("/")[0]][0])


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "chat.json", "x" * 200, "model.onnx.data/../chat.json"]
)
def test_a_graph_that_reads_weights_elsewhere_is_refused(
    good: Path, tmp_path: Path, refused: Refused, location: str
) -> None:
    graph = copied(good, "bundle/model.onnx", tmp_path)
    model = onnx.load(graph, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    graph.write_bytes(model.SerializeToString())
    vouch(graph)
    for arguments in commands(good, tmp_path, tmp_path / "out")["bundle"]:
        assert "reads weights from" in refused(*arguments)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("bundle/")][1:])
def test_hard_links_into_a_bundle_are_refused(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    file = copied(good, name, tmp_path)
    os.link(file, tmp_path / "elsewhere")
    assert "linked to a file elsewhere" in refused("show", tmp_path / "bundle")


def test_pickled_weights_are_refused(good: Path, tmp_path: Path, refused: Refused) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "boom",))

    file = copied(good, "checkpoint/model.safetensors", tmp_path)
    torch.save({"embedding.weight": Bomb()}, file)
    vouch(file)
    refused("export", tmp_path / "checkpoint", "--out", tmp_path / "out")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (folder / "tokenizer.json").write_text((good / "checkpoint/tokenizer.json").read_text())
    torch.save({"embedding.weight": Bomb()}, folder / "pytorch_model.bin")
    refused("import", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('touch boom') }}",
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{% for a in range(10**9) %}{% endfor %}",
    ],
)
def test_a_malicious_template_is_harmless(
    good: Path, tmp_path: Path, refused: Refused, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = copied(good, "bundle/chat.json", tmp_path)
    file.write_text(json.dumps({"eos_token_ids": [], "bos_token_id": None, "chat_template": template}))
    vouch(file)
    refused("generate", tmp_path / "bundle", "--prompt", "hi", "--chat", "--max-tokens", 1)
    assert not (tmp_path / "boom").exists()


RULES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"heads": 0}, "heads is 0"),
    ({}, {"layers": 0}, "layers is 0"),
    ({}, {"layers": -1}, "layers is -1"),
    ({}, {"layers": 2**31}, "layers is 2147483648"),
    ({}, {"width": 2**63}, "width is 9223372036854775808"),
    ({}, {"heads": 2.0}, "heads must be a whole number"),
    ({}, {"ffn_width": "48"}, "ffn_width must be a whole number"),
    ({}, {"kv_heads": True}, "kv_heads must be a whole number"),
    ({}, {"kv_heads": 3}, "must divide its heads"),
    ({}, {"shared": 1}, "shared must be a bool"),
    ({}, {"depth": 1}, "unknown depth"),
    ({"vocab_size": 0}, {}, "vocab_size is 0"),
    ({"max_positions": 10**30}, {}, "max_positions is 1"),
    ({"norm": ["rmsnorm"]}, {}, "norm is ['rmsnorm']"),
    ({"norm_epsilon": "1e-5"}, {}, "norm_epsilon must be a float"),
    ({"rotary_dim": 3}, {}, "must be even"),
    ({"blocks": []}, {}, "blocks is empty"),
    ({"blocks": {}}, {}, "blocks must be a list"),
    ({"blocks": [None]}, {}, "must be an object"),
]


@pytest.mark.parametrize(("model", "block", "says"), RULES)
def test_rules_of_an_architecture(
    good: Path, tmp_path: Path, refused: Refused, model: dict[str, Any], block: dict[str, Any], says: str
) -> None:
    whole = TINY.to_dict()
    document = {"kind": "architecture", "schema_version": 1}
    broken = {**whole, "blocks": [{**whole["blocks"][0], **block}], **model}
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**document, "architecture": broken}))
    for arguments in commands(good, tmp_path, tmp_path / "out")["a.json"]:
        assert says in refused(*arguments)


def test_widths_must_not_decrease_and_json_must_be_strict(good: Path, tmp_path: Path, refused: Refused) -> None:
    whole = TINY.to_dict()
    wide = {**whole["blocks"][0], "width": 64, "heads": 4}
    good_text = json.dumps({"kind": "architecture", "schema_version": 1, "architecture": whole})
    texts = {
        "widths must not decrease": json.dumps(
            {**json.loads(good_text), "architecture": {**whole, "blocks": [wide, whole["blocks"][0]]}}
        ),
        "a key appears twice": good_text.replace('"layers": 2', '"layers": 2, "layers": 2'),
        "NaN is not JSON": good_text.replace("1e-05", "NaN"),
        "beyond the range of numbers": good_text.replace("1e-05", "1e999"),
    }
    for says, text in texts.items():
        assert text != good_text
        (tmp_path / "a.json").write_text(text)
        assert says in refused(*train(tmp_path / "a.json", good, tmp_path / "out"))
    (tmp_path / "a.json").write_text(
        good_text.replace(', "shared": true', "")
    )  # written by hand, without an optional key
    assert run("show", tmp_path / "a.json") == 0
