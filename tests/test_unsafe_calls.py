"""No shipped file runs code that comes as data, no shell, and no file name that another user can guess.

It reads the syntax trees of the package, the benchmarks, the tools and the site's hooks, and imports none of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = ("merino_edge", "search", "export", "runtime", "jetson", "benchmarks", "tools", "docs/hooks")
# Modules whose reader runs code of the file that it reads.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
BUILT_IN = {"eval", "exec", "compile", "__import__", "execfile"}
CALLS = {
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "pty.spawn": "a shell",
    "asyncio.create_subprocess_shell": "a shell",
    "tempfile.mktemp": "a guessable name",
    "torch.load": "a pickle",
    "torch.jit.load": "code",
    "torch.hub.load": "code",
    "pandas.read_pickle": "a pickle",
    "pd.read_pickle": "a pickle",
    "runpy.run_path": "code",
    "runpy.run_module": "code",
    "yaml.unsafe_load": "unsafe YAML",
    "yaml.full_load": "unsafe YAML",
    "yaml.load_all": "unsafe YAML",
}
SAFE_YAML = {"SafeLoader", "CSafeLoader", "BaseLoader"}
KEYWORDS = {"shell": "a shell", "allow_pickle": "a pickle", "trust_remote_code": "fetched code"}
SUBPROCESSES = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
# A user's own score is code that the user names. No artefact can name one (docs/certificate.md, docs/search.md).
ALLOWED = {("search/score.py", "exec_module"), ("search/check_certificate.py", "exec_module")}


def dotted(node: ast.expr) -> str:
    """`os.path.join` of such an expression; empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if isinstance(node, ast.Attribute) and inner else ""


def aliases(tree: ast.AST) -> dict[str, str]:
    """What names of imports stand for: {"run": "subprocess.run", "sp": "subprocess"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_text(node: ast.expr, texts: set[str]) -> bool:
    """Whether an expression is a string, as far as the file alone tells."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.BinOp):
        return is_text(node.left, texts) or is_text(node.right, texts)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in ("join", "format")
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Name) and node.id in texts)


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of everything in a file that must not be."""
    known = aliases(tree)
    texts: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and is_text(node.value, set()):
            texts |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module]
            yield from ((node.lineno, f"imports {name}") for name in named if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in of_call(node, known, texts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/tmp/"):
            yield node.lineno, "a guessable name under /tmp"


def of_call(node: ast.Call, known: dict[str, str], texts: set[str]) -> Iterator[str]:
    name = dotted(node.func)
    head, dot, rest = name.partition(".")
    name = known.get(head, head) + dot + rest
    if name in BUILT_IN or name in {f"builtins.{one}" for one in BUILT_IN}:
        yield f"calls {name}"
    if name in CALLS:
        yield f"{name}: {CALLS[name]}"
    if name.endswith(".exec_module"):
        yield "exec_module"
    if name == "yaml.load":
        loader = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "Loader")]
        if not loader or dotted(loader[0]).rpartition(".")[2] not in SAFE_YAML:
            yield "yaml.load: unsafe YAML"
    for word in node.keywords:
        if word.arg in KEYWORDS and not (isinstance(word.value, ast.Constant) and word.value.value in (False, None)):
            yield f"{word.arg}: {KEYWORDS[word.arg]}"
    if name in SUBPROCESSES and node.args and is_text(node.args[0], texts):
        yield f"{name} gets a string, not a list of arguments"
    if name.endswith(".extractall") and not any(word.arg == "filter" for word in node.keywords) and "tar" in name:
        yield f"{name}: a member may lie outside the folder"


def shipped(repository: Path) -> list[Path]:
    files = {file.resolve() for folder in FOLDERS for file in (repository / folder).rglob("*.py")}
    return sorted(files)


def test_no_shipped_file_has_an_unsafe_call(repository: Path) -> None:
    files, found = shipped(repository), []
    assert len(files) > 200  # else a folder was missed
    for file in files:
        name = str(file.relative_to(repository))
        for line, what in findings(ast.parse(file.read_text())):
            if (name, what) not in ALLOWED:
                found.append(f"{name}:{line}: {what}")
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "import builtins\nbuiltins.exec(text)",
        "__import__(name)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load as read\nread(text)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import subprocess as sp\nsp.run('ls ' + folder)",
        "import subprocess\nsubprocess.run(f'ls {folder}')",
        "from subprocess import Popen\ncommand = f'ls {folder}'\nPopen(command)",
        "import os\nos.system(command)",
        "from os import popen\npopen(command)",
        "from tempfile import mktemp\nmktemp()",
        "open('/tmp/merino', 'w')",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "loader.exec_module(module)",
        "model.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_each_unsafe_call_is_found(code: str) -> None:
    assert len(list(findings(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "re.compile(pattern)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import subprocess\nsubprocess.run([program, f'--out={path}'], shell=False)",
        "import subprocess\ncommand = [program]\nsubprocess.run([*command, 'x'])",
        "import numpy as np\nnp.load(path)",
    ],
)
def test_what_is_safe_is_not_found(code: str) -> None:
    assert not list(findings(ast.parse(code)))
