"""compose.yaml serves a bundle as the pages run the container, and its health check asks a server that runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from helpers.served import serving
from merino_edge.cli.main import app
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.server.app import Service
from merino_edge.tokenizer import Tokenizer

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def service(repository: Path) -> dict[str, Any]:
    document = yaml.safe_load((repository / "compose.yaml").read_text())
    assert document["volumes"] == {"engines": {"name": "merino-engines"}}
    [(name, service)] = document["services"].items()
    assert name == service["image"] == "merino-edge"
    return dict(service)


def docker_options(page: str) -> dict[str, str]:
    """The variables gpu and board as a page's first block sets them."""
    found: dict[str, str] = {}
    for name, value in re.findall(r'^(gpu|board)="(.*)"$', page, re.M):
        found[name] = value.replace("$board", found.get("board", ""))
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/start-orin-nano.md"])
def test_it_mounts_and_allows_what_the_pages_do(repository: Path, service: dict[str, Any], page: str) -> None:
    options = docker_options((repository / page).read_text())
    mounts = re.findall(r"-v (\S+)", " ".join(options.values()))
    named = [mount.replace("merino-engines", "engines") for mount in mounts]
    assert sorted(service["volumes"]) == sorted(["./bundles:/bundles:ro", *named])
    assert "/var/lib/nvpmodel:/var/lib/nvpmodel:ro" in mounts
    assert re.findall(r"--security-opt (\S+)", options["board"]) == service["security_opt"]
    assert f"--runtime {service['runtime']}" in options["gpu"]
    assert options["gpu"].count("--group-add") == len(service["group_add"]) == 2


def test_every_docker_line_of_the_pages_has_the_engines_and_the_board(repository: Path) -> None:
    for page in ("README.md", "docs/start-orin-nano.md"):
        text = (repository / page).read_text().replace("\\\n", " ")
        runs = re.findall(r"^docker run .*$", text, re.M)
        assert runs and all("$gpu $board" in line for line in runs)
        verbs = [line.split("merino-edge ", 1)[1].split()[0] for line in runs if "--entrypoint" not in line]
        assert verbs[:4] == ["doctor", "profile", "build", "generate"]
        assert "--backend tensorrt" in runs[1]


def test_its_command_is_one_that_serve_takes(service: dict[str, Any]) -> None:
    verb, bundle, *options = service["command"]
    found: Any = typer.main.get_command(app)
    serve_options = found.get_command(found.make_context("merino-edge", [], resilient_parsing=True), verb)
    assert set(options[::2]) <= {name for parameter in serve_options.params for name in parameter.opts}
    assert bundle.startswith("/bundles/${BUNDLE:?")
    port = options[options.index("--port") + 1]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]  # without TLS it is for this machine only
    assert "MERINO_EDGE_API_KEY" in service["environment"]


def test_the_health_check_tells_a_server_that_runs(
    service: dict[str, Any], engine: Engine, tokenizer: Tokenizer
) -> None:
    """It needs no key, which the server itself wants."""
    kind, program, option, code = service["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python", "-c") and "127.0.0.1:8080" in code

    def healthy(url: str) -> bool:
        asks = [sys.executable, "-c", code.replace("http://127.0.0.1:8080", url)]
        return subprocess.run(asks, capture_output=True, check=False).returncode == 0

    with serving(Service(engine, tokenizer, "small", waiting=1, key="secret")) as url:
        assert healthy(url)
    assert not healthy(url)
