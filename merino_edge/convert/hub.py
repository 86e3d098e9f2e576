"""Models of the Hugging Face hub by name, downloaded into the hub's own cache and verified.

Only what an import reads is downloaded (merino_edge.convert.hub_name): safetensors or GGUF, configuration, tokenizer.
Nothing is run. A download that stops goes on where it was. Weights are compared with the hashes that the hub names.
`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean for every tool of the hub.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from merino_edge import artefact, names, output
from merino_edge.convert import hub_cache, weight_files
from merino_edge.convert.hub_cache import Snapshot
from merino_edge.convert.hub_name import HubName, chosen_gguf, wanted
from merino_edge.errors import ArtefactError, InputError, MerinoError, OutputError, require

OnBytes = Callable[[int, int], None]  # called with (bytes here, bytes in all)
MOST_SUGGESTED = 5


def fetch(name: HubName, on_bytes: OnBytes = lambda done, total: None) -> Snapshot:
    """The model's files in the hub's cache: a folder, or one GGUF file. What is there already is not downloaded again.

    Raises InputError (no network, no such model, not allowed), UnsupportedError (pickles only), OutputError (no room),
    ArtefactError (a hash is not the hub's), MissingExtraError.
    """
    require("huggingface_hub", "import")
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity(40)  # logging.ERROR: its warnings tell of each attempt
    try:
        with _told(name):
            revision, sizes, hashes = _listing(name)
    except InputError:
        if (here := _here(name)) is None:
            raise
        return here  # without a network, what was downloaded before
    read = wanted(name, list(sizes))
    cache = Path(constants.HF_HUB_CACHE)
    missing = {file: sizes[file] for file in read if not _cached(name, revision, file)}
    check_memory(name.repository, sum(sizes[file] for file in read), _available_bytes())
    check_room(cache, sum(missing.values()))
    done, total = sum(sizes[file] for file in read if file not in missing), sum(sizes[file] for file in read)
    paths = []
    for file in read:
        before = done if file in missing else done - sizes[file]
        report = partial(_report, on_bytes, before, total)
        paths.append(_download(name, revision, file, report, size=sizes[file], sha256=hashes.get(file, "")))
        done += sizes[file] if file in missing else 0
        on_bytes(done, total)
    depth = len(PurePosixPath(read[0]).parts)
    folder = paths[0].parents[depth - 1]
    is_gguf = read[0].endswith(".gguf")
    return Snapshot(paths[0] if is_gguf else folder, name.repository, revision)


def _report(on_bytes: OnBytes, before: int, total: int, here: int) -> None:
    on_bytes(before + here, total)


def _listing(name: HubName) -> tuple[str, dict[str, int], dict[str, str]]:
    """The revision's hash, the size of every file, and the sha256 of the large ones."""
    from huggingface_hub import HfApi, constants

    info = HfApi(constants.ENDPOINT).model_info(name.repository, revision=name.revision or None, files_metadata=True)
    sizes, hashes = {}, {}
    for file in info.siblings or []:
        if ".." in PurePosixPath(file.rfilename).parts or PurePosixPath(file.rfilename).is_absolute():
            continue  # it would lie outside the cache
        sizes[file.rfilename] = int(file.size or 0)
        lfs: Any = file.lfs
        digest = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
            hashes[file.rfilename] = digest
    if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
        raise ArtefactError(f"the hub names no revision of {name.repository}", "try again later")
    return str(info.sha), sizes, hashes


def _here(name: HubName) -> Snapshot | None:
    """What an earlier download of the same name left whole, if anything."""
    folder = _folder(name)
    own = folder / "snapshots" / name.revision
    if not own.is_dir() or ".." in name.revision:
        return None
    try:
        found = hub_cache.snapshot(own if name.revision else folder)
        if not name.file:
            weight_files.find(found.path)
            return found
        files = [str(path.relative_to(found.path)) for path in found.path.rglob("*.gguf")]
        return dataclasses.replace(found, path=found.path / chosen_gguf(name, files)[0])
    except MerinoError:
        return None


# --- downloading -----------------------------------------------------------------------------------


def _cached(name: HubName, revision: str, file: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name.repository, file, constants.HF_HUB_CACHE, revision)
    return isinstance(found, str)


def check_memory(repository: str, download_bytes: int, available_bytes: int | None) -> None:
    """Raise InputError where an import surely takes more memory than is free: float32 weights, twice."""
    needed = 4 * download_bytes  # of 16-bit weights
    if available_bytes is not None and needed > available_bytes:
        machine = "board" if Path("/proc/device-tree/nvidia,dtsfilename").exists() else "machine"
        raise InputError(
            f"{repository} is too large for this {machine}: importing it takes more than {needed / 1e9:.1f} GB of "
            f"memory, {available_bytes / 1e9:.1f} GB are free",
            "import and export it on a larger one, and copy the bundle; sizes: merino-edge import --list",
        )


def _available_bytes() -> int | None:
    """The memory that a process can have without swapping; None where the system does not say."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", artefact.read_head(Path("/proc/meminfo")).decode(), re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


def check_room(cache: Path, needed_bytes: int) -> None:
    """Raise OutputError where the disk of `cache` has too little room."""
    at = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(at).free
    if needed_bytes > free:
        raise OutputError(
            f"the model needs {needed_bytes / 1e9:.2f} GB of disk, {cache} has {free / 1e9:.2f} GB free",
            "free some, or set HF_HOME to a folder on another disk",
        )


def _download(
    name: HubName, revision: str, file: str, on_bytes: Callable[[int], None], *, size: int, sha256: str
) -> Path:
    """The file in the cache. A large one, which has a hash, goes on where an earlier process stopped."""
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if not sha256 or _cached(name, revision, file):
        with _told(name):
            found = Path(hf_hub_download(name.repository, file, revision=revision, cache_dir=constants.HF_HUB_CACHE))
        on_bytes(size)
        return found
    folder = _folder(name)
    blob, pointer = folder / "blobs" / sha256, folder / "snapshots" / revision / file
    part = blob.with_name(f"{sha256}.merino-edge")  # the library's own name for it changes with each process
    with output.lock(part), _told(name):
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            with open(part, "ab") as beginning:
                here, more = beginning.tell(), dict[str, Any]()
                if "tqdm_class" in inspect.signature(http_get).parameters:  # of newer releases
                    more["tqdm_class"] = _counter(on_bytes)
                url = hf_hub_url(name.repository, file, revision=revision)
                if here < size:
                    http_get(url, beginning, resume_size=here, headers=build_hf_headers(), expected_size=size, **more)
            if artefact.sha256_file(part) != sha256:
                part.unlink()
                raise ArtefactError(f"{file} does not have the sha256 that the hub names", "run the same command again")
            os.replace(part, blob)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if not pointer.exists():
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    return pointer


def _folder(name: HubName) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{hub_cache.PREFIX}{name.repository.replace('/', '--')}"


def _counter(on_bytes: Callable[[int], None]) -> type:
    """A progress bar that shows nothing and reports how many bytes are here."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Counter(tqdm):  # type: ignore[misc,unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._here = int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            on_bytes(self._here)

        def update(self, n: float | None = 1) -> bool | None:
            self._here += int(n or 0)
            on_bytes(self._here)
            return None

    return Counter


@contextmanager
def _told(name: HubName) -> Iterator[None]:
    """The library's errors, each as one line that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except MerinoError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            f"{name.repository} is shown only to who accepts its terms",
            f"accept them at {constants.ENDPOINT}/{name.repository}, then run: hf auth login",
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{name.repository} has no revision {name.revision!r}", f"see {constants.ENDPOINT}/{name.repository}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"the hub has no model {name.repository}", _nearest(name.repository)) from None
    except errors.HFValidationError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{name.repository} is no name of the hub ({why})", "see: merino-edge import --list") from None
    except errors.OfflineModeIsEnabled:
        raise InputError(f"{name.repository} is not here, and HF_HUB_OFFLINE is set", "unset it") from None
    except Exception as error:  # those of the library, and of the HTTP client under it, which changes
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise OutputError(
                f"{name.repository} cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror})",
                "free some disk, or set HF_HOME to another; the same command goes on where it stopped",
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"{name.repository} cannot be downloaded ({reason})",
            "check the network, then run the same command again: it goes on where it stopped",
        ) from None


def _nearest(repository: str) -> str:
    """The hint for a name that the hub does not have: names that it has."""
    from merino_edge.convert.known_models import KNOWN

    known = [model.name for model in KNOWN]
    found = [near] if (near := names.near(repository, known)) else []
    try:
        from huggingface_hub import HfApi, constants

        listed = HfApi(constants.ENDPOINT).list_models(
            search=repository.partition("/")[2], limit=MOST_SUGGESTED, sort="downloads"
        )
        found += [model.id for model in listed if model.id not in found]
    except Exception:  # it is only a suggestion
        return _did_you_mean(found)
    return _did_you_mean(found)


def _did_you_mean(found: Sequence[str]) -> str:
    if found:
        return f"did you mean {' or '.join(found[:MOST_SUGGESTED])}?"
    return "see: merino-edge import --list"
