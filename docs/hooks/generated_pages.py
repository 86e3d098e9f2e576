"""Pages and sections that mkdocs makes from the code, so that they cannot disagree with it.

A page says where a section goes by a comment: <!-- generated: NAME -->. Sections: commands, exit-codes, api, artefacts,
rooms. Whole pages: those of PAGES, from files outside docs/. The build fails where a page would load anything from
another server.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "release.md": "RELEASE.md",
    "security.md": "SECURITY.md",
    "lamb.md": "merino_edge/bundles/lamb/README.md",
}
# Title, what it is called on disk, who writes it, who reads it, and the modules whose docstrings hold its form.
ARTEFACTS = (
    ("Every JSON artefact", "", "", "", ("artefact.py",)),
    (
        "Latency table",
        "`NAME.jsonl`",
        "`profile`, `estimate`",
        "`search`, `pareto`, `show`",
        ("latency/table_file.py", "latency/table.py", "latency/measurement.py"),
    ),
    ("Architecture", "`NAME.json`", "`search`, or a person", "`train`, `search --from`", ("architecture.py",)),
    ("Search result", "`NAME.json`", "`search`", "`train`, `search --from`, `verify`, `show`", ("search/result.py",)),
    ("Pareto front", "`NAME.json`", "`pareto`", "`show`", ("search/pareto.py",)),
    ("Search space", "`NAME.json`", "a person", "`search`, `pareto`, `profile`, `study`", ("search/space_file.py",)),
    ("Corpus", "folder", "`tokenize`, `train`", "`train`, `distill logits`", ("data/corpus.py", "data/shards.py")),
    ("Recipe", "`NAME.json`", "a person", "`train --recipe`", ("training/recipe.py",)),
    (
        "Checkpoint",
        "folder",
        "`train`, `import`",
        "`export`, `train`, `evaluate`",
        ("checkpoint.py", "training/state.py"),
    ),
    ("Prompts", "`NAME.json` or `NAME.txt`", "a person", "`distill generate`", ("distillation/prompts.py",)),
    (
        "Synthetic corpus",
        "`NAME.jsonl` and `NAME.json`",
        "`distill generate`",
        "`tokenize`, `train`",
        ("distillation/synthetic_corpus.py",),
    ),
    ("Teacher logits", "folder", "`distill logits`", "`train --teacher`", ("distillation/teacher_logits.py",)),
    ("Bundle", "folder", "`export`", "`build`, `generate`, `serve`, `bench`, `evaluate`", ("bundle.py",)),
    (
        "Engine",
        "`NAME.plan` and `NAME.json`",
        "`build`",
        "`generate`, `serve`, `bench`, `evaluate`",
        ("engine_store.py", "jetson/engine_build.py"),
    ),
    ("Prompt cache", "file", "`generate --prompt-cache`", "the same", ("runtime/prompt_cache.py",)),
    (
        "Evaluation report",
        "`NAME.json`",
        "`evaluate --out`",
        "`evaluate --against`",
        ("runtime/evaluation/harness.py", "runtime/evaluation/perplexity.py"),
    ),
    ("Study", "folder", "`study`", "`study`, `show`", ("training/study_runs.py", "search/study/scores.py")),
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that come from files outside docs/."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text() if (ROOT / source).exists() else f"# {Path(name).stem.title()}\n"
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the generated sections, and point links that leave docs/ to the pages made here."""
    sections = {
        "commands": commands,
        "exit-codes": exit_codes,
        "api": api,
        "artefacts": artefacts,
        "rooms": rooms,
    }
    markdown = re.sub(r"<!-- generated: ([\w-]+) -->", lambda m: "\n".join(sections[m[1]]()), markdown)
    for name, source in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}", f"]({name}", markdown)
    if page.file.src_uri in PAGES:  # their links are relative to the repository's root
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\(\.\./README\.md", "](index.md", markdown)


def on_post_build(config: Any) -> None:
    """Fail where a page loads a script, style or picture from another server."""
    for page in Path(config["site_dir"]).rglob("*.html"):
        if loaded := re.search(
            r"<(?:script|img|iframe|link(?![^>]*rel=\"?canonical))\b[^>]*(?:src|href)=\"?(https?:)?//[^>]*>",
            page.read_text(),
        ):
            raise PluginError(f"{page} loads {loaded[0]}")


# --- commands --------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """A section for every command of the program, as `--help` has it."""
    sys.path.insert(0, str(ROOT))
    import click
    import typer

    from merino_edge.cli.main import app

    group: Any = typer.main.get_command(app)
    context = click.Context(group, info_name="merino-edge")
    for name in group.list_commands(context):
        yield from _command(group.get_command(context, name), f"merino-edge {name}", 2)


def _command(command: Any, name: str, level: int) -> Iterator[str]:
    import click

    context = click.Context(command, info_name=name)
    yield f"{'#' * level} {name.removeprefix('merino-edge ')}\n"
    yield _prose(command.help or "") + "\n"
    if hasattr(command, "list_commands"):
        for sub in command.list_commands(context):
            yield from _command(command.get_command(context, sub), f"{name} {sub}", level + 1)
        return
    usage = " ".join(
        piece for parameter in command.get_params(context) for piece in parameter.get_usage_pieces(context)
    )
    yield f"```text\n{name} [OPTIONS] {usage}".rstrip() + "\n```\n"
    panels: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) is not None and "--help" not in record[0]:
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or default
            panels.setdefault(title, []).append(f"| {_code(record[0])} | {_cell(record[1])} |")
    for title, rows in panels.items():
        yield "\n".join([f"| {_cell(title)} | |", "|---|---|", *rows, ""])


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def _cell(text: str) -> str:
    """Plain text as a cell of a Markdown table; what stands between backticks is code already."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [re.sub(r"([|*_<\[\]{}])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def exit_codes() -> Iterator[str]:
    """The exit codes of the program, from merino_edge/errors.py."""
    rows = {0: "Done."}
    for node in ast.parse((ROOT / "merino_edge/errors.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            codes = [
                s.value.value for s in node.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant)
            ]
            meaning = (ast.get_docstring(node) or "").split("\n\n")[0]
            for code in codes:
                text = f"`{node.name}`: {_cell(meaning)}"
                rows[code] = f"{rows[code]} {text}" if code in rows else text
    yield "| exit code | meaning |\n|---|---|"
    yield from (f"| {code} | {meaning} |" for code, meaning in sorted(rows.items()))
    yield "| 141 | The reader of a pipe went away. |\n"


# --- Python API ------------------------------------------------------------------------------------


def api() -> Iterator[str]:
    """A section for every name of `merino_edge.__all__`."""
    sys.path.insert(0, str(ROOT))
    package = importlib.import_module("merino_edge")
    for name in package.__all__:
        module, _, original = package._HOMES[name].partition(":")
        node = _definition(module, original or name)
        yield f"### {name}\n"
        yield f"`{module}.{original or name}`\n"
        if isinstance(node, ast.ClassDef):
            yield from _class(node, name)
        else:
            yield f"```python\n{_signature(node, name)}\n```\n"
            yield _prose(ast.get_docstring(node) or "") + "\n"


def _definition(module: str, name: str) -> Any:
    path = ROOT / (module.replace(".", "/") + ".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
    raise PluginError(f"{module} has no {name}")


def _class(node: ast.ClassDef, name: str) -> Iterator[str]:
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n).startswith("_")]
    if (start := methods.get("__init__")) is not None:
        code = _signature(start, name, method=True)
    else:
        code = "\n".join([f"class {name}:", *(f"    {field}" for field in fields)])
    yield f"```python\n{code}\n```\n"
    yield _prose(ast.get_docstring(node) or "") + "\n"
    if start is not None and (text := ast.get_docstring(start)):
        yield _prose(text) + "\n"
    rows = []
    for method in methods.values():
        if not method.name.startswith("_") and (text := ast.get_docstring(method)):
            decorators = {ast.unparse(d) for d in method.decorator_list}
            spelled = method.name if "property" in decorators else f"{method.name}{_arguments(method, method=True)}"
            rows.append(
                f"| {_code(spelled)} | {' '.join(text.split(chr(10) * 2)[0].split()).replace('|', chr(92) + '|')} |"
            )
    if rows:
        yield "\n".join(["| method or property | |", "|---|---|", *rows, ""])


def _arguments(node: ast.FunctionDef, *, method: bool) -> str:
    text = ast.unparse(node.args)
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    if method and not static:
        text = re.sub(r"^(self|cls)(, )?", "", text)
    return f"({text})"


def _signature(node: ast.FunctionDef, name: str, *, method: bool = False) -> str:
    arguments = _arguments(node, method=method)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    if len(name + arguments + returns) > 100:
        parts = re.split(r", (?![^\[(]*[\])])", arguments[1:-1])
        arguments = "(\n" + "".join(f"    {part},\n" for part in parts) + ")"
    return f"{name}{arguments}{returns}"


# --- artefacts and rooms ---------------------------------------------------------------------------


def artefacts() -> Iterator[str]:
    """A section for every artefact: who writes and reads it, and its form from the module's docstring."""
    for title, form, writers, readers, modules in ARTEFACTS:
        yield f"## {title}\n"
        if form:
            yield f"On disk: {form}. Written by {writers}. Read by {readers}.\n"
        for module in modules:
            path = next(p for p in (ROOT / module, ROOT / "merino_edge" / module) if p.exists())
            yield f"From `{path.relative_to(ROOT)}`:\n"
            yield _prose(ast.get_docstring(ast.parse(path.read_text())) or "") + "\n"


def rooms() -> Iterator[str]:
    """Which room may import which, from the test that checks it."""
    tree = ast.parse((ROOT / "tests/test_rooms.py").read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "MAY_IMPORT")
    assert isinstance(table, ast.Dict)
    yield "| room | may import, besides the shared nouns |\n|---|---|"
    for room, others in zip(table.keys, table.values, strict=True):
        names = sorted(e.value for e in getattr(others, "elts", []))
        yield f"| {ast.literal_eval(room)} | {', '.join(names) or '-'} |"
    yield "| cli | every room |\n"


def _prose(docstring: str) -> str:
    """A docstring as Markdown: what is indented, or laid out in columns, becomes a block of code."""
    parts = []
    for part in re.split(r"\n\s*\n", textwrap.dedent(docstring).strip("\n")):
        lines = part.splitlines()
        if any(re.match(r" {3,}\S", line) for line in lines):
            code = textwrap.dedent(part)
            if parts and parts[-1].endswith("\n```"):  # a form with an empty line in it
                parts[-1] = f"{parts[-1][:-4]}\n\n{code}\n```"
            else:
                parts.append(f"```text\n{code}\n```")
        else:
            parts.append(part if lines[0].startswith("|") else re.sub(r"(?<!`)<(?=\w)", "&lt;", part))
    return "\n\n".join(parts)
