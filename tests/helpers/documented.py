"""The blocks of a page, run as a reader would run them: in their order, in one folder, as they are printed.

A block is fenced: ```LANGUAGE title="TITLE". What happens to it depends on the language and the title:

    sh, python                     runs here
    any, title="NAME.EXTENSION"    is written to that file
    sh, title="in a second terminal"    runs in the background until the page ends; its server must answer
    sh, title of ELSEWHERE         needs another machine, and is not run
    any other language             is output or a form, and is not run

Lines that set something up are checked but not run: `pip install` (its extras exist), `make` (its target exists).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tomllib

from helpers.warm_python import warm_folder, warm_python
from merino_edge.errors import UnfitTableError

ELSEWHERE = (
    "on the board",
    "on an emulated board",
    "on a GPU workstation",
    "on a machine with eight GPUs",
    "in a checkout",
    "takes hours",
)
SECOND_TERMINAL = "in a second terminal"
TIMEOUT_S = 1200  # of one command, on a busy machine
SERVER_START_S = 120
FENCE = re.compile(r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    title: str
    text: str


class Ran(NamedTuple):
    """A command that ran, as it is printed in the page, what it said, and the file that `--out` names (empty: none)."""

    command: str
    stdout: str
    stderr: str
    written: str = ""


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    return [Block(m["language"], m["title"] or "", m["text"]) for m in FENCE.finditer(page)]


def commands(block: Block) -> list[str]:
    """The commands of a shell block; one that goes on after a backslash is one."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def commands_outside_blocks(page: str) -> list[str]:
    """Indented lines that a reader takes for commands: they belong into a fenced block, where they are run."""
    prose = FENCE.sub("", page)
    return re.findall(r"^ {4}((?:\$ )?(?:merino-edge|make|pip|docker|torchrun|python)\s.*)$", prose, re.M)


@cache
def _program() -> Any:
    import typer

    from merino_edge.cli.main import app

    return typer.main.get_command(app)


@cache  # else each verb would be made again for each command of a page
def _commands_of(group: Any) -> dict[str, Any]:
    context = group.make_context("merino-edge", [], resilient_parsing=True)
    return {name: group.get_command(context, name) for name in group.list_commands(context)}


def unknown_words(command: str) -> list[str]:
    """The verb or options of a `merino-edge` command that the program does not have; for commands that are not run."""
    if "merino-edge " not in command or command.startswith("docker build"):
        return []
    found = _program()
    words = [word for word in command.split("merino-edge ", 1)[1].split("#")[0].split("|")[0].split() if word != "..."]
    while hasattr(found, "list_commands") and words and not words[0].startswith("-"):
        if words[0].isupper():  # a placeholder
            return []
        if words[0] not in _commands_of(found):
            return words[:1]
        found = _commands_of(found)[words.pop(0)]
    options = {"--help", *(o for p in found.params for o in (*p.opts, *p.secondary_opts))}
    return [word for word in words if re.match("--?[a-z]", word) and word.split("=")[0] not in options]


class PageRunner:
    """Runs the blocks of one page in `folder`. `shorter` replaces what a reader would wait minutes for.

    `warm`: in processes of helpers.warm_python, which spare each command seconds of imports.
    `made_before` keeps which folders earlier pages made of SmolLM2 by the same command.
    """

    def __init__(
        self,
        repository: Path,
        folder: Path,
        shorter: Mapping[str, str],
        variables: Mapping[str, str],
        made_before: dict[str, Path] | None = None,
        warm: bool = True,
    ) -> None:
        self.repository, self.folder, self.shorter = repository, folder, shorter
        self.made_before = {} if made_before is None else made_before
        self.python = warm_python() if warm else sys.executable
        folders = [*([str(warm_folder())] if warm else []), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.variables = {**os.environ, "PATH": os.pathsep.join(folders), **variables}
        self.ran: list[Ran] = []

    def run_page(self, page: str, inline: str = "(?!)") -> list[Ran]:
        """Run every block, then the commands within sentences that match `inline`. Fails at the first that fails."""
        with ExitStack() as servers:
            for block in read_blocks(page):
                if "." in block.title and " " not in block.title:
                    (self.folder / block.title).write_text(self._shortened(block.text))
                elif block.title == SECOND_TERMINAL:
                    servers.enter_context(self._in_background(commands(block)[0]))
                elif block.language == "python":
                    self._run(block.text, [self.python, "-c", self._shortened(block.text)])
                elif block.language == "sh" and block.title not in ELSEWHERE:
                    for command in commands(block):
                        self._run_line(command)
            for command in re.findall(rf"`({inline})`", page):
                self._run_line(command)
        return self.ran

    def _shortened(self, text: str) -> str:
        for long, short in self.shorter.items():
            text = text.replace(long, short)
        return text

    def _run_line(self, command: str) -> None:
        if command.startswith("python3 -m venv"):
            return  # the tests have an environment already
        if command.startswith("pip install"):
            extras = tomllib.loads((self.repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            wanted = {extra for group in re.findall(r"\[([\w,-]+)\]", command) for extra in group.split(",")}
            assert wanted <= set(extras), f"{command}: no such extra"
        elif command.startswith("make "):
            target = command.split()[1]
            assert re.search(rf"^{target}:", (self.repository / "Makefile").read_text(), re.M), f"no target {target}"
        elif match := re.fullmatch(r"export (\w+)=.*", command):
            assert match[1] in self.variables, f"the test of this page gives no {match[1]}"
        else:
            self._run(command, ["bash", "-c", self._shortened(command)])

    def _run(self, printed: str, command: list[str]) -> None:
        of_smollm2 = re.fullmatch(r"merino-edge (?:import \S*smollm2\S*|export smollm2) .*--out (\S+).*", printed)
        out = of_smollm2[1] if of_smollm2 else ""
        if out and command[-1] in self.made_before:  # the same command, on the same file
            shutil.copytree(self.made_before[command[-1]], self.folder / out)
            return
        done = subprocess.run(
            command, cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        # Tests measure for seconds and beside each other, so what they measure need not be fit for use.
        fine = {0, UnfitTableError.exit_code} if re.match("merino-edge profile", printed) else {0}
        assert done.returncode in fine, f"{printed}\n{done.stdout}\n{done.stderr}"
        if out:
            self.made_before[command[-1]] = self.folder / out
        named = re.search(r"--out (\S+\.json)\b", command[-1])
        written = (self.folder / named[1]).read_text() if named and (self.folder / named[1]).is_file() else ""
        self.ran.append(Ran(printed, done.stdout, done.stderr, written))

    @contextmanager
    def _in_background(self, command: str) -> Iterator[None]:
        command = self._shortened(command)
        port = match[1] if (match := re.search(r"--port (\d+)", command)) else "8080"
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.variables, stderr=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + SERVER_START_S
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, f"{command}\n{server.stderr.read() if server.stderr else ''}"
                assert time.monotonic() < deadline, f"{command} did not answer"
                time.sleep(0.2)
            yield
        finally:
            server.terminate()
            server.communicate(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
