"""The verb `serve`: it serves until Ctrl-C, and its refusals are one line."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import openai
import pytest

from helpers.served import PATIENCE_SECONDS, ask
from helpers.warm_python import warm_merino
from merino_edge import limits


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "merino-edge: interrupted"), (signal.SIGTERM, 0, "")]
)
def test_the_verb_serves_until_it_is_told_to_end(
    bundle_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    command = [warm_merino(), "serve", str(bundle_path), "--port", "0", "--name", "small"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        where = program.stderr.readline().split()[2].removesuffix(";")
        at_once = program.stderr.readline()
        assert at_once.startswith("4 answers run at once") and " MB" in at_once
        with openai.OpenAI(base_url=where, api_key="none", max_retries=0) as client:
            assert ask(client).choices[0].finish_reason == "length"
            endless = client.completions.create(
                model="small", prompt="fox", stream=True, max_tokens=limits.MAX_NEW_TOKENS
            )
            next(iter(endless))
            program.send_signal(number)
        assert program.wait(PATIENCE_SECONDS) == code
        assert program.stderr.read().strip() == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0"), "give --api-key TEXT"),
        (("--api-key", ""), "--api-key is empty"),
        (("--port", "70000"), "port is 70000"),
        (("--host", "192.0.2.1", "--api-key", "x"), "cannot listen on 192.0.2.1"),
        (("--waiting", "-1"), "waiting is -1"),
        (("--parallel", "0"), "parallel is 0"),
        (("--parallel", "2", "--lookup"), "draft tokens follow one answer"),
    ],
)
def test_the_verb_refuses_what_cannot_be(bundle_path: Path, options: tuple[str, ...], said: str) -> None:
    command = [warm_merino(), "serve", str(bundle_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named(bundle_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [warm_merino(), "serve", str(bundle_path), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"port {port}" in done.stderr and done.stderr.count("\n") == 1
