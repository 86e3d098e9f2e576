"""Models of the hub by name, from a stand-in on this machine: whole, resumed, verified, and refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.hub_stand_in import REVISION, Hub, point_to, serve
from helpers.tiny_huggingface import LLAMA, imported, save
from helpers.warm_python import warm_merino
from merino_edge import checkpoint
from merino_edge.convert.hub import check_memory, check_room
from merino_edge.convert.hub_name import HubName
from merino_edge.convert.import_model import import_model, locate
from merino_edge.convert.known_models import KNOWN
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.errors import ArtefactError, InputError, OutputError, UnsupportedError

NAME = "Owner/a-model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, and its checkpoint `model-checkpoint` beside it."""
    return save(tmp_path_factory.mktemp("hub") / "model", LLAMA)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(Hub({NAME: {**_files(model), "pytorch_model.bin": b"pickle", "README.md": b"hello"}})) as hub:
        point_to(hub.address, monkeypatch)
        yield hub


def test_a_name_gives_the_model_and_its_revision(hub: Hub, model: Path, tmp_path: Path) -> None:
    want, seen = imported(model, tmp_path / "want"), []
    import_model(NAME, tmp_path / "ckpt", on_bytes=lambda done, total: seen.append((done, total)))
    got = checkpoint.load(tmp_path / "ckpt")
    assert all(np.array_equal(got.weights[name], want[name]) for name in want)
    source = got.training["source"]
    assert source["hub"] == NAME and source["revision"] == REVISION
    assert not {"pytorch_model.bin", "README.md"} & {file for _, file in hub.asked}
    done, totals = [d for d, _ in seen], {total for _, total in seen}
    assert done == sorted(done) and totals == {done[-1]} and done[-1] > 10_000
    hub.asked.clear()
    for name in (NAME, f"{NAME}@{REVISION}", f"{NAME}@main", f"hf.co/{NAME}"):
        assert locate(name).path.name == REVISION
    assert not [one for one in hub.asked if one[0] == "GET"]  # all is here already


def test_a_hub_that_stops_half_way_is_gone_on_with(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # it keeps whole pieces, else of 10 MB
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)  # it tries five times
    hub.most_bytes = 40_000
    with pytest.raises(InputError, match=r"cannot be downloaded .* same command again: it goes on where it stopped"):
        import_model(NAME, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
    hub.most_bytes, hub.ranges = None, []
    import_model(NAME, tmp_path / "ckpt")
    assert len(hub.ranges) == 1 and not hub.ranges[0].startswith("bytes=0-")


def test_a_file_with_another_hash_is_removed(hub: Hub, tmp_path: Path) -> None:
    hub.wrong_hash = True
    with pytest.raises(ArtefactError, match=r"model\.safetensors does not have the sha256 that the hub names"):
        import_model(NAME, tmp_path / "ckpt")
    assert not list((tmp_path / "cache").rglob("model.safetensors")) and not list((tmp_path / "cache").rglob("*edge"))
    hub.wrong_hash = False
    import_model(NAME, tmp_path / "ckpt")


def test_without_a_network_what_is_here_is_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locate(NAME)
    point_to("http://127.0.0.1:9", monkeypatch)  # nobody listens
    import_model(NAME, tmp_path / "ckpt")
    assert checkpoint.load(tmp_path / "ckpt").training["source"]["revision"] == REVISION
    with pytest.raises(InputError, match=r"Owner/other cannot be downloaded .*check the network"):
        import_model("Owner/other", tmp_path / "other")


def test_names_that_do_not_exist_get_the_nearest(hub: Hub, tmp_path: Path) -> None:
    for given_name, says in (
        ("Owner/a-modle", f"the hub has no model Owner/a-modle; did you mean {NAME}"),
        ("Qwen/Qwen3-0.6", "did you mean Qwen/Qwen3-0.6B"),
        (f"{NAME}@nowhere", "has no revision 'nowhere'"),
        ("zzz/zzzzzz", "see: merino-edge import --list"),
    ):
        with pytest.raises(InputError, match=says):
            import_model(given_name, tmp_path / "ckpt")
    hub.gated = {NAME}
    with pytest.raises(InputError, match=r"accepts its terms; accept them at .*hf auth login"):
        import_model(NAME, tmp_path / "ckpt")


def test_a_model_larger_than_the_disk_is_refused_before_it_begins(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_bytes = 10**15
    with pytest.raises((OutputError, InputError), match=r"needs .* GB of disk, .* set HF_HOME|too large for this"):
        import_model(NAME, tmp_path / "ckpt")
    with pytest.raises(OutputError, match=r"needs .* GB of disk, .* set HF_HOME"):
        check_room(tmp_path / "cache", 10**15)
    assert not hub.asked


def test_a_model_larger_than_the_memory_is_refused() -> None:
    check_memory(NAME, 10**9, 4 * 10**9)
    check_memory(NAME, 10**15, None)
    with pytest.raises(
        InputError, match=r"too large for this machine: .* 4\.0 GB of memory, 3\.9 GB are free; .*--list"
    ):
        check_memory(NAME, 10**9, 39 * 10**8)


def test_shapes_of_known_models_give_the_published_parameters() -> None:
    published = {"Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768}
    published |= {"meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400, "google/gemma-3-270m-it": 268_098_176}
    published |= {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384, "google/gemma-3-1b-it": 999_885_952}
    published |= {"LiquidAI/LFM2-350M": 354_483_968, "LiquidAI/LFM2-1.2B": 1_170_340_608}
    for model in KNOWN:
        assert HubName.parse(model.name) is not None
        if model.name in published:
            assert abs(model.parameters / published[model.name] - 1) < 1e-3


def test_files_of_gguf_are_chosen_by_name(hub: Hub, model: Path, tmp_path: Path) -> None:
    files = {}
    for precision, quantisation in (("int8", "Q8_0"), ("fp16", "F16"), ("int4", "Q4_1")):
        export_to_gguf(model.with_name("model-checkpoint"), tmp_path / "m.gguf", precision)
        files[f"a-model-{quantisation}.gguf"] = (tmp_path / "m.gguf").read_bytes()
    hub.models["Owner/a-GGUF"] = files
    with pytest.raises(InputError, match=r"several models; choose one: Owner/a-GGUF:a-model-F16.gguf, "):
        import_model("Owner/a-GGUF", tmp_path / "ckpt")
    with pytest.raises(InputError, match="no one file is named 'Q5_K'"):
        import_model("Owner/a-GGUF:Q5_K", tmp_path / "ckpt")
    for number, file in enumerate(("q8_0", "a-model-Q8_0.gguf")):
        import_model(f"Owner/a-GGUF:{file}", tmp_path / f"ckpt{number}")
        source = checkpoint.load(tmp_path / f"ckpt{number}").training["source"]
        assert source["format"] == "gguf" and source["hub"] == "Owner/a-GGUF" and source["name"] == "a-model-Q8_0.gguf"
    assert {file for _, file in hub.asked} == {"a-model-Q8_0.gguf"}


def test_pickles_alone_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.models["Owner/old"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(UnsupportedError, match=r"has no safetensors, and a pickle can run code .*refs/pr/1"):
        import_model("Owner/old", tmp_path / "ckpt")
    hub.models["Owner/none"] = {"README.md": b"x"}
    with pytest.raises(InputError, match="holds no weights"):
        import_model("Owner/none", tmp_path / "ckpt")


@settings(max_examples=30, deadline=None)
@given(st.text("aB1./-_@: ", max_size=20))
def test_only_names_of_the_hub_are_names(text: str) -> None:
    found = HubName.parse(text)
    if found is not None:
        assert found.repository.count("/") == 1 and ".." not in found.repository.split("/")


def test_paths_are_no_names() -> None:
    for text in ("model", "./a/b", "/a/b", "a/b/c", "a/b.gguf", "../b", "a/..", "", "a/", "a b/c"):
        assert HubName.parse(text) is None, text
    for address in ("https://huggingface.co/a/b", str(Path("https://huggingface.co/a/b")), "hf.co/a/b"):
        assert HubName.parse(address) == HubName("a/b")
        assert str(HubName.parse(f"{address}@v1:Q8_0")) == "a/b@v1:Q8_0"
    assert HubName.parse("a/b@refs/pr/1:Q4_K_M") == HubName("a/b", "refs/pr/1", "Q4_K_M")


def test_command_line(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([warm_merino(), "import", *words], capture_output=True, text=True, env=environment)

    done = run("--list", "--json")
    listed = json.loads(done.stdout)["models"]
    assert done.returncode == 0 and len(listed) > 10
    assert "orin-nano-8gb" in next(row for row in listed if row["name"] == "Qwen/Qwen3-0.6B")["boards"]
    table = run("--list").stdout.splitlines()
    assert "8 GB" in next(line for line in table if line.startswith("microsoft/Phi-4-mini"))
    assert all(len(line) <= 80 for line in table[: 1 + len(listed)])
    missing = run(NAME)
    assert missing.returncode == InputError.exit_code and "--out CHECKPOINT is missing" in missing.stderr


def test_a_missing_path_in_a_folder_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ArtefactError, match=r"models/small does not exist; .* give hf\.co/models/small"):
        locate("models/small")


@pytest.mark.parametrize(("text", "name"), [("qwen3", "Qwen/Qwen3-0.6B"), ("Qwen3-06B", "Qwen/Qwen3-0.6B"), ("x", "")])
def test_part_of_a_known_name_is_enough_for_a_hint(text: str, name: str) -> None:
    hint = f"did you mean {name}" if name else "check the path"
    with pytest.raises(ArtefactError, match=hint):
        locate(text)
