"""Models that are made ready to run once: imported, exported and tuned, and kept in the user's cache.

    models/NAME-HASH/source.json    {"source", "files": [[name, bytes, mtime_ns], ...], "tool"}, once NAME is whole
                     NAME           the bundle; HASH is that of the model's place and of how it is exported
                     checkpoint     only while the bundle is made

A model whose files have changed, or whose bundle another version wrote, is made again. Every step is a verb of this
program in a process of its own, printed as a person would type it.
"""

from __future__ import annotations

import json
import re
import resource
import shlex
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from merino_edge import __version__, artefact, atomic, bundle, names, output, wrong_kind
from merino_edge.cli.child_verb import INTERRUPTED, VerbInterrupted, run_verb
from merino_edge.errors import ArtefactError

MODELS = ("checkpoint", "gguf", "huggingface")
CONTEXT = 2048  # positions of the KV cache, unless the model has fewer
JETPACKS = {"R36": "jetpack-6.2", "R38": "jetpack-7.1", "R39": "jetpack-7.2"}  # by the release of L4T
STDERR = 2  # stdout is for the answer


@dataclass(frozen=True)
class Form:
    """How a model is exported. No context: the default; no target: this machine's."""

    precision: str = "int4"
    context: int | None = None
    target: str = ""


def bundle_of(model: Path | str, form: Form | None = None) -> Path:
    """The bundle of a model, made ready if need be; `model` itself where it is a bundle or nothing that is known.

    `model` is a bundle, a checkpoint, a GGUF file, a Hugging Face folder, or a name that `import` fetches. Raises
    typer.Exit where a step fails, which has printed why; OutputError where the cache cannot be written; ArtefactError
    where nothing is there.
    """
    path = Path(model)
    require(path)
    if not _is_model(path):
        return path
    form = form or Form()
    entry, name = _place(path, form)
    source = _source(path)
    made = entry / name
    if _is_made(made, source):
        _tune(made)
        return made
    console, began = _console(), time.monotonic()
    with output.lock(entry):
        if not _is_made(made, source):  # else another process made it meanwhile
            try:
                _make(path, entry, made, form)
            finally:
                atomic.remove(entry / "checkpoint")
                with suppress(OSError):  # it holds a bundle
                    entry.rmdir()
            artefact.write_text(entry / "source.json", json.dumps(source, indent=2) + "\n")
    _tune(made)
    memory_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    console.print(
        f"ready in {time.monotonic() - began:.0f} s, with {memory_gb:.1f} GB of memory at most; kept in {made}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return made


def require(model: Path | str) -> None:
    """Raise ArtefactError where nothing stands at a path that is no name, or no model; the nearest name is offered."""
    from merino_edge.convert import known_models, pretrained

    path = Path(model)
    if _is_model(path) or bundle.find(model) != path:
        return
    packaged = [*bundle.packaged(), pretrained.NAME]
    unlike = names.is_missing(path) and not (names.near(str(model), packaged) or names.beside(path))
    if unlike and (known := known_models.near(str(model))):
        raise ArtefactError(f"{model} does not exist", f"did you mean {known}?")
    wrong_kind.require(path, bundle.KIND, *MODELS, packaged=packaged)


def _is_model(path: Path) -> bool:
    """Whether this is something to import or export; a missing path in a folder that exists is no name."""
    from merino_edge.convert import hub_name, pretrained

    if not names.is_missing(path):
        marks = ("snapshots", "adapter_config.json")  # of the hub's cache, and of a LoRA adapter
        return wrong_kind.kind_of(path) in MODELS or any((path / mark).exists() for mark in marks)
    if bundle.find(path) != path:
        return False
    is_hub_name = hub_name.HubName.parse(str(path)) is not None and not path.parent.is_dir()
    return pretrained.is_name(str(path)) or is_hub_name


def _place(path: Path, form: Form) -> tuple[Path, str]:
    """The folder of a model in the cache, and the name of its bundle."""
    key = artefact.sha256_text(artefact.canonical_json({"source": _where(path), **asdict(form)}))
    stem = path.stem if path.suffix == ".gguf" else path.resolve().name
    name = f"{re.sub('[^A-Za-z0-9._-]', '-', stem)[:80].strip('.-') or 'model'}-{form.precision}"
    return artefact.user_cache() / "models" / f"{name}-{key[:8]}", name


def _where(path: Path) -> str:
    from merino_edge.convert import hub_name

    if not names.is_missing(path):
        return str(path.resolve())
    name = hub_name.HubName.parse(str(path))
    return str(path) if name is None else str(name)


def _source(path: Path) -> dict[str, Any]:
    """What tells that a model is the same: its place, and the sizes and times of its files."""
    files, where = [], _where(path)
    if path.is_dir():
        from merino_edge.convert import adapter, hub_cache

        path = hub_cache.snapshot(path).path
        base = adapter.base_folder(path) if adapter.is_adapter(path) else None  # merged, so it is a source too
        folders = [path] if base is None or base == path else [path, base]
        files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    elif path.exists():
        files = [path]
    stats = [(file.name, file.stat()) for file in files]
    listed = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return {"source": where, "files": listed, "tool": __version__}


def _is_made(made: Path, source: dict[str, Any]) -> bool:
    """Whether the bundle is whole and of this source."""
    with suppress(OSError, ValueError):
        recorded = json.loads((made.parent / "source.json").read_text(encoding="utf-8"))
        return bool(recorded == source) and (made / "manifest.json").is_file()
    return False


def _make(path: Path, entry: Path, made: Path, form: Form) -> None:
    from merino_edge.errors import require_all

    packages = {"import": ["gguf", "safetensors", "ml_dtypes"], "export": ["onnx", "onnx_ir"], "train": ["torch"]}
    require_all(packages)
    from merino_edge.export.targets import Target

    target = form.target or _target_here()
    Target.named(target, form.precision)  # refuse before minutes of work
    (entry / "source.json").unlink(missing_ok=True)
    atomic.remove(made)
    checkpoint = path
    if wrong_kind.kind_of(path) != "checkpoint":
        checkpoint = entry / "checkpoint"
        atomic.remove(checkpoint)
        _run("import", str(path), "--out", str(checkpoint))
    from merino_edge import architecture

    a = architecture.load(checkpoint / "architecture.json")[0]
    context = form.context or min(CONTEXT, a.max_positions)
    options = ("--precision", form.precision, "--context", str(context), "--target", target)
    _run("export", str(checkpoint), "--out", str(made), *options)


def _tune(made: Path) -> None:
    """Measure the number of threads, or compile the engine, where that was not done on this machine."""
    from merino_edge import engine_store
    from merino_edge.graph_io import ONNX_CUDA_TARGET
    from merino_edge.runtime.thread_tuning import tuning_for_this_machine

    opened = bundle.load(made, verify=False)
    if opened.target == ONNX_CUDA_TARGET:
        return
    ready = tuning_for_this_machine(opened) if opened.target == "onnxruntime" else engine_store.engines_of(opened)
    if not ready:
        _run("build", str(made))


def _target_here() -> str:
    """A Jetson's own TensorRT, else ONNX Runtime."""
    from merino_edge import tensorrt_library
    from merino_edge.jetson.device.card import device_card

    release = re.search(r"R\d+", str(device_card()["l4t"]))
    board = JETPACKS.get(release[0]) if release else None
    return board if board is not None and tensorrt_library.is_installed("tensorrt") else "onnxruntime"


def _run(*words: str) -> None:
    interrupts = list[bool]()
    _console().print(f"$ merino-edge {shlex.join(words)}", markup=False, highlight=False, soft_wrap=True, style="bold")
    try:
        run_verb(words, stdout=STDERR, on_interrupt=lambda: interrupts.append(True))
    except VerbInterrupted as told:
        raise typer.Exit(INTERRUPTED) from told
    if interrupts:  # the verb had just ended
        raise KeyboardInterrupt


def _console() -> Any:
    from merino_edge.cli import console

    return console.stderr()
