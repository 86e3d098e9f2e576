"""`merino-edge serve BUNDLE`: serves a bundle with OpenAI's API until Ctrl-C. It prints the address on stderr."""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from merino_edge.cli.bundle_options import (
    LAMB,
    BundleOrLamb,
    ControlTokens,
    Cpu,
    DraftPath,
    LookupFlag,
    TemplateOptions,
    Threads,
    open_proposer,
    open_sequences,
    template_options,
)
from merino_edge.errors import InputError

if TYPE_CHECKING:
    from merino_edge.runtime.engine import SequenceGroup

GRACE_SECONDS = 2  # for answers that still run when the server ends


def serve(
    bundle: BundleOrLamb = LAMB,
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines can reach needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="API key that clients must send.", envvar="MERINO_EDGE_API_KEY", show_envvar=True
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients. [default: the folder's name]")
    ] = None,
    waiting: Annotated[int, typer.Option(help="Requests that may wait. More are refused with status 429.")] = 8,
    parallel: Annotated[
        int | None,
        typer.Option(metavar="N", help="Answers that run at once. [default: as the memory allows, at most 4]"),
    ] = None,
    lookup: LookupFlag = False,
    draft: DraftPath = None,
    control_tokens: ControlTokens = False,
    chat_template_kwargs: TemplateOptions = None,
    threads: Threads = None,
    cpu: Cpu = False,
) -> None:
    """Serve a bundle over HTTP with OpenAI's API."""
    from merino_edge import __version__, artefact, limits
    from merino_edge.cli.console import stderr
    from merino_edge.errors import require_all

    require_all({"serve": ["starlette", "uvicorn", "pydantic", "prometheus_client"]})
    limits.check_range("port", port, 0, 65535)
    limits.check_range("waiting", waiting, 0, limits.MAX_WAITING)
    if parallel is not None:
        limits.check_range("parallel", parallel, 1, limits.MAX_SEQUENCES)
    if lookup or draft:
        if (parallel or 1) > 1:
            raise InputError(
                "draft tokens follow one answer at a time", "leave --parallel out, or --lookup and --draft"
            )
        parallel = 1
    options = template_options(chat_template_kwargs)
    if api_key == "":
        raise InputError("the API key is empty", "give --api-key TEXT, or unset MERINO_EDGE_API_KEY")

    import uvicorn

    from merino_edge.runtime.sequence_memory import sequence_bytes
    from merino_edge.runtime.server import connections
    from merino_edge.runtime.server.app import Service
    from merino_edge.runtime.server.refusals import LOCAL_NAMES

    if api_key is None and host not in LOCAL_NAMES:
        raise InputError(f"{host} can be reached from elsewhere", "give --api-key TEXT, or --host 127.0.0.1")

    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(host, port))
        group, tokenizer, opened = open_sequences(bundle, parallel, threads, cpu=cpu)
        stack.enter_context(contextlib.closing(group))
        engine = group.members[0]
        if proposer := open_proposer(engine, opened, lookup=lookup, draft=draft, threads=threads, cpu=cpu):
            stack.enter_context(contextlib.closing(proposer))
        service = Service(
            engine,
            tokenizer,
            name or opened.path.resolve().name,
            waiting=waiting,
            key=api_key,
            group=group,
            proposer=proposer,
            control_tokens=control_tokens,
            template_options=options,
            fingerprint=f"fp_{artefact.sha256_text(f'{__version__} {opened.card()}')[:12]}",
        )
        stack.callback(service.close)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: object) -> None:
                service.cancel_all()  # else the server would wait for their ends
                if sig == signal.SIGTERM:  # a process manager's stop is no failure
                    self.should_exit = True
                else:
                    super().handle_exit(sig, frame)  # type: ignore[arg-type]

        config = connections.config(service.application(), timeout_graceful_shutdown=GRACE_SECONDS)
        shown_host, shown_port = f"[{host}]" if ":" in host else host, listening.getsockname()[1]
        stderr().print(
            f"{service.name} on http://{shown_host}:{shown_port}/v1; Ctrl-C ends", highlight=False, markup=False
        )
        stderr().print(_sequences_line(group, sequence_bytes(opened)), highlight=False, markup=False)
        Server(config).run(sockets=[listening])


def _sequences_line(group: SequenceGroup, each_bytes: int) -> str:
    count = len(group.members)
    if count == 1:
        return "one answer runs at a time"
    how = "their steps together" if group.joins_steps else "in turns: together they would be rounded otherwise"
    return f"{count} answers run at once, {how}; each further one takes up to {each_bytes / 1e6:,.0f} MB"


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError where the address is not of this machine, or is in use."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on {host} port {port} ({reason})", "choose another --host or --port") from None
