"""The models of a profile as TensorRT's engines: each graph is compiled once on a machine, whatever ends the profile.

An engine stays in the engine store's folder `profile`, by its model, the GPU and the library with its release. Its file
is a line of JSON, {"graph_sha256", "seconds", "sha256"}, and the plan. The graph must be the one that was compiled.
`seconds` is how long the compiler took: an estimate needs it after a first dry run, too. The folder may be deleted.
Beyond the store's limit those of earlier profiles are removed (merino_edge.store_limit). Where the disk has no room,
engines are held in memory as far as they fit, and the profile goes on.

The lowering follows the TensorRT that is there. If the largest native model does not compile, all are primitive.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from merino_edge import artefact, engine_store, store_limit, tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.errors import OutputError, UnsupportedError
from merino_edge.export.tensorrt import build_engine, default_lowering, profile_target, require_kernels
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.engine_build import OUT_OF_MEMORY, usual_workspace_bytes, without_memory
from merino_edge.jetson.kernel_timings import KernelTimings, machine_hash
from merino_edge.jetson.profiler.random_graph import random_graph

SPARE_BYTES = 1_000_000_000  # of the disk, which engines leave free
HELD_BYTES = 256_000_000  # of engines in memory, where the disk has no room


class CompiledModels:
    """TensorRT's engines of models with random weights.

    `warnings` has a line for each kind of thing that went wrong without ending the profile.
    """

    def __init__(self, library: str, capability: str) -> None:
        """`capability`: the GPU's, such as SM87.

        Raises what `load` of merino_edge.tensorrt_library raises, and InputError where the store's limit is no number.
        """
        require_kernels(library, capability)
        store_limit.limit_bytes()
        card = device_card()
        self.library, self.capability = library, capability
        self.warnings: list[str] = []
        self.compiled = 0  # how often the compiler ran
        self._lowering = ""  # that was chosen; "": that of the library
        self._timings = KernelTimings(library, card)
        self._machine = f"{capability}-{machine_hash(library, card)}"
        self._graph_sha256: dict[Path, str] = {}
        self._held: dict[Path, bytes] = {}
        self._refused: dict[Path, UnsupportedError] = {}

    @cached_property
    def folder(self) -> Path:
        """Where engines are kept."""
        return engine_store.store_folder() / "profile"

    def lowering(self, precision: str) -> str:
        """The lowering of the graphs at `precision`."""
        usual = default_lowering(self.library, precision)
        return usual if usual == "primitive" else self._lowering or usual

    def choose_lowering(self, a: Architecture, precision: str, begun: str = "") -> None:
        """Compile `a`, and take the primitive lowering for all models if the native one does not compile.

        `begun`: the lowering of the table that is continued. Raises UnsupportedError where memory runs out, which says
        nothing about the lowering.
        """
        self._lowering = begun
        if begun or self.lowering(precision) == "primitive":
            return
        try:
            self.seconds(a, precision)
        except UnsupportedError as error:
            if OUT_OF_MEMORY.search(error.message):
                raise
            self._lowering = "primitive"
            self._warn(f"measuring the primitive lowering: {error.message}")

    def is_compiled(self, a: Architecture, precision: str) -> bool:
        """Whether the engine is there."""
        path = self._path(a, precision)
        return path in self._held or path in self._refused or path.is_file()

    def seconds(self, a: Architecture, precision: str) -> float:
        """How long compiling `a` took; it is compiled now if it was not. Raises UnsupportedError."""
        return self._engine(a, precision)[0]

    def plan(self, a: Architecture, precision: str) -> bytes:
        """The serialized engine of `a`. Raises UnsupportedError."""
        return self._engine(a, precision)[1]

    def _engine(self, a: Architecture, precision: str) -> tuple[float, bytes]:
        path = self._path(a, precision)
        if path in self._refused:
            raise self._refused[path]
        graph = b""
        if path not in self._graph_sha256:  # it is the same in every run of one version, and making it takes long
            graph = self._graph(a, precision)
            self._graph_sha256[path] = artefact.sha256_bytes(graph)
        content = self._held.get(path, b"")
        with suppress(OSError):
            content = content or path.read_bytes()
            store_limit.mark_used(path)
        if found := _read(content, self._graph_sha256[path]):
            return found
        return self._compile(path, graph or self._graph(a, precision), a.max_positions)

    def _compile(self, path: Path, graph: bytes, context: int) -> tuple[float, bytes]:
        try:
            built = build_engine(
                self.library,
                graph,
                context,
                self.capability if self.library == tensorrt_library.RTX else "",
                workspace_bytes=usual_workspace_bytes(),
                timings=self._timings.data,
            )
        except UnsupportedError as error:
            if OUT_OF_MEMORY.search(error.message):  # another try may get it
                raise without_memory(error, "profile again") from error
            self._refused[path] = error
            raise
        self.compiled += 1
        self._warn(self._timings.keep(built.timings))
        head = {
            "graph_sha256": self._graph_sha256[path],
            "seconds": round(built.seconds, 2),
            "sha256": artefact.sha256_bytes(built.plan),
        }
        self._keep(path, artefact.canonical_json(head).encode() + b"\n" + built.plan)
        return built.seconds, built.plan

    def _graph(self, a: Architecture, precision: str) -> bytes:
        return random_graph(a, precision, profile_target(self.library), self.lowering(precision))

    def _path(self, a: Architecture, precision: str) -> Path:
        model = artefact.sha256_text(artefact.canonical_json([a.to_dict(), precision, self.lowering(precision)]))
        return self.folder / f"{model[:24]}-{self._machine}.engine"

    def _keep(self, path: Path, content: bytes) -> None:
        try:
            with artefact.translate_os_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if shutil.disk_usage(self.folder).free < len(content) + SPARE_BYTES:
                    raise OutputError(f"{self.folder} has less than {SPARE_BYTES / 1e9:g} GB free", "free the disk")
            artefact.write_bytes(path, content)
            # Those of this profile stay, even beyond the limit: each is opened several times.
            if store_limit.remove_least_used(self.folder.parent, self._graph_sha256, of_bundles=False):
                self._warn(f"engines of earlier profiles were removed: the store is full ({store_limit.VARIABLE})")
        except OutputError as error:
            if not self._held:
                self._warn(f"engines are not kept, so another profile compiles them again: {error.message}")
            self._held[path] = content
            while sum(map(len, self._held.values())) > HELD_BYTES:
                del self._held[next(iter(self._held))]

    def _warn(self, line: str) -> None:
        if line and line not in self.warnings:
            self.warnings.append(line)


def _read(content: bytes, graph_sha256: str) -> tuple[float, bytes] | None:
    """The seconds and the plan; None where the file is damaged, or of another graph."""
    head, _, plan = content.partition(b"\n")
    try:
        fields = json.loads(head)
        right = (fields["graph_sha256"], fields["sha256"]) == (graph_sha256, artefact.sha256_bytes(plan))
        return (float(fields["seconds"]), plan) if right else None
    except (ValueError, KeyError, TypeError):
        return None
