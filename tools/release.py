"""Builds a release from the last commit, checks it and writes it to a folder.

The sdist is built from the commit's files, and the wheel from the sdist. The wheel is installed into a new environment,
where it must run. No test is run and no container is built. The folder then holds:

    merino_edge-VERSION.tar.gz, merino_edge-VERSION-py3-none-any.whl    what is uploaded
    licences.md      the licence of each runtime dependency
    sbom.cdx.json    the same packages as a CycloneDX software bill of materials
    SHA256SUMS       the hash of each of these files

    make release        needs the packages of the dependency group `release`
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "merino_edge"
# Files that a user would miss first. The whole list is compared too; these say why it matters.
MUST_HAVE = (
    "py.typed",
    "bundles/lamb/manifest.json",
    "bundles/lamb/model.onnx",
    "bundles/lamb/model.onnx.data",
    "bundles/lamb/tokenizer.json",
    "recipes/pile.json",
    "recipes/prompts/children.json",
    "search/front.html",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a release, check it and write it to a folder.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder to write; it is emptied first")
    out = parser.parse_args().out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = last_commit(work)
        sdist, wheel = build(source, out)
        check_metadata(sdist, wheel)
        check_file_list(sdist, wheel, package_files(source))
        python = install(wheel, work)
        check_that_it_runs(python, work)
        write_licences(python, out)
        write_sbom(python, out)
    write_hashes(out)
    print(f"release: {len(list(out.iterdir()))} files in {out}")


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed. Raises SystemExit with its output where it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"release: {' '.join(map(str, command))} failed\n{done.stdout}")
    return done.stdout


def module(name: str, *arguments: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run a Python module of this environment."""
    return run(sys.executable, "-m", name, *arguments, cwd=cwd, env=env)


def last_commit(work: Path) -> Path:
    """Lay out the files of the last commit in a folder of their own, and return it."""
    if run("git", "status", "--porcelain", "--untracked-files=no"):
        print("release: the working tree has changes that are not committed; the release has the commit's files")
    source = work / "source"
    source.mkdir()
    run("git", "archive", "--output", work / "source.tar", "HEAD")
    with tarfile.open(work / "source.tar") as archive:
        archive.extractall(source, filter="data")
    return source


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """Build the sdist from `source` and the wheel from the sdist, each in isolation."""
    # With the commit's time, two wheels of one commit are equal, byte for byte. Two sdists are not.
    commit_time = run("git", "log", "-1", "--format=%ct").strip()
    module("build", "--outdir", out, cwd=source, env={**os.environ, "SOURCE_DATE_EPOCH": commit_time})
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def check_metadata(sdist: Path, wheel: Path) -> None:
    """Check what a package index would refuse, and what often goes wrong in wheels."""
    print(module("twine", "--no-color", "check", "--strict", sdist, wheel).strip())
    print(module("check_wheel_contents", wheel).strip())


def check_file_list(sdist: Path, wheel: Path, expected: set[str]) -> None:
    """Check that sdist and wheel hold each file of the package, in real folders, and that the wheel has no other."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if not name.startswith(f"{PACKAGE}-")}
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
        in_sdist = {member.name.split("/", 1)[1] for member in members}
        links = [member.name for member in members if not member.isfile()]
    problems = [f"the wheel lacks {name}" for name in sorted(expected - in_wheel)]
    problems += [f"the wheel has {name}, which is not of the package" for name in sorted(in_wheel - expected)]
    problems += [f"the sdist lacks {name}" for name in sorted(expected - in_sdist)]
    problems += [f"the sdist has the link {name}" for name in links]
    problems += [f"the wheel lacks {name}" for name in MUST_HAVE if f"{PACKAGE}/{name}" not in in_wheel]
    if problems:
        raise SystemExit("\n".join(["release: the files are not those of the package:", *problems]))
    print(f"files: {len(in_wheel)} in the wheel, each once, as in the commit")


def package_files(source: Path) -> set[str]:
    """The source's files of the package, by the names that they have once installed: links are followed."""
    return {
        str((Path(folder) / name).relative_to(source))
        for folder, _, names in os.walk(source / PACKAGE, followlinks=True)
        for name in names
    }


def install(wheel: Path, work: Path) -> Path:
    """Install the wheel with its tested dependencies into an environment of its own; return its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", work / "environment")
    python = work / "environment" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    module("pip", "--quiet", "--python", python, "install", "-c", constraints, wheel)
    return python


def check_that_it_runs(python: Path, work: Path) -> None:
    """Run the installed program in an empty folder: its version, the doctor, and four tokens of the packaged model."""
    empty = work / "empty"
    empty.mkdir()
    program = python.with_name("merino-edge")
    for arguments in (["--version"], ["doctor"], ["generate", "--prompt", "hi", "--max-tokens", "4"]):
        printed = run(program, *arguments, cwd=empty)
        if not printed.strip():
            raise SystemExit(f"release: merino-edge {' '.join(arguments)} printed nothing")
        print(f"merino-edge {' '.join(arguments)}: {printed.strip().splitlines()[0]}")


def write_licences(python: Path, out: Path) -> None:
    """Write a table of the installed packages and their licences."""
    module("piplicenses", f"--python={python}", "--format=markdown", "--with-urls", f"--output-file={out}/licences.md")


def write_sbom(python: Path, out: Path) -> None:
    """Write the installed packages as a CycloneDX document."""
    project = ROOT / "pyproject.toml"
    file = out / "sbom.cdx.json"
    module("cyclonedx_py", "environment", "--output-reproducible", "--pyproject", project, "-o", file, python)


def write_hashes(out: Path) -> None:
    """Write the sha256 of each file in the form that `sha256sum --check` reads."""
    files = sorted(out.iterdir())
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (out / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
