"""Tests of the source itself: sizes, docstrings, words, layers."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pkgutil
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import replnbd

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "replnbd"
SCRIPTS = ROOT / "scripts"

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70  # the hard limit of TigerStyle; h11's and qemu.qmp's longest are below it
PACKAGE_DOCSTRING_LINES_MIN = 6

SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = sorted([*SOURCES, *SCRIPTS.glob("*.py"), *(ROOT / "tests").rglob("*.py")])
TEXTS = [*PYTHON, *SCRIPTS.glob("[!_]*"), *ROOT.glob("*.md"), *ROOT.glob("examples/*.toml")]
SHELL = sorted(
    path
    for path in [*SCRIPTS.iterdir(), *(ROOT / ".ci").iterdir()]
    if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!"))
)

# The words of the field instead: cookie (NBD since 2023), primary and secondary.
AVOIDED_NAMES = {"handle", "handles", "req_handle", "request_handle", "nbd_handle"}
AVOIDED_MODULES = {"util", "utils", "helpers", "misc", "common", "manager", "info"}
AVOIDED_WORDS = re.compile(
    r"\b(?:mas" + r"ter|sla" + r"ve|white" + r"list|black" + r"list)s?\b", re.I
)
MACHINE_PATHS = re.compile(r"(?<![\w.$}*~-])/(?:home|root|work)/\w+")


def name_of(path: Path) -> str:
    """A path as the project's people say it."""
    return str(path.relative_to(ROOT))


def modules() -> Iterator[ModuleType]:
    """Every module of the package, imported."""
    yield replnbd
    for found in pkgutil.walk_packages([str(PACKAGE)], "replnbd."):
        if not found.name.endswith("__main__"):  # importing it would run it
            yield importlib.import_module(found.name)


def documented(member: object) -> bool:
    """Whether a docstring is there, or a base has it; generated ones do not count."""
    text = inspect.getdoc(member) if not inspect.isclass(member) else member.__doc__
    if inspect.isclass(member) and text and text.startswith(f"{member.__name__}("):
        return False  # what dataclass and NamedTuple make up
    return bool(text and text.strip())


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public classes, functions and methods defined in `module` that have no docstring."""
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        if not (inspect.isclass(member) or inspect.isfunction(member)):
            continue
        if not documented(member):
            yield f"{module.__name__}.{name}"
        if not inspect.isclass(member):
            continue
        for key, raw in vars(member).items():
            method = getattr(member, key, None) if not isinstance(raw, property) else raw
            is_code = isinstance(raw, property | classmethod | staticmethod)
            if key.startswith("_") or not (is_code or inspect.isfunction(raw)):
                continue
            if not documented(method) and not _inherits_docstring(member, key):
                yield f"{module.__name__}.{name}.{key}"


def _inherits_docstring(cls: type, key: str) -> bool:
    return any(documented(vars(base)[key]) for base in cls.__mro__[1:] if key in vars(base))


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in lengths.items() if lines > FILE_LINES_MAX}


def test_no_function_is_longer_than_70_lines() -> None:
    long = [
        f"{name_of(path)}:{node.lineno}: {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES_MAX
    ]
    assert not long, "\n".join(long)


def test_every_package_opens_with_what_it_is_and_its_laws() -> None:
    lengths = {
        name_of(path): len((ast.get_docstring(ast.parse(path.read_text())) or "").splitlines())
        for path in SOURCES
        if path.name == "__init__.py"
    }
    assert not {n: lines for n, lines in lengths.items() if lines < PACKAGE_DOCSTRING_LINES_MIN}


def test_every_module_has_a_docstring() -> None:
    assert not [name_of(p) for p in PYTHON if not ast.get_docstring(ast.parse(p.read_text()))]


def test_everything_public_has_a_docstring() -> None:
    missing = [name for module in modules() for name in undocumented(module)]
    assert not missing, "\n".join(missing)


def test_names_are_the_specifications_words() -> None:
    for path in SOURCES:
        assert path.stem not in AVOIDED_MODULES, f"{name_of(path)} says nothing of what is in it"
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        names = {token.string for token in tokens if token.type == tokenize.NAME}
        assert not names & AVOIDED_NAMES, f"{name_of(path)}: say cookie"


def test_texts_have_no_avoided_words_and_no_paths_of_one_machine() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if AVOIDED_WORDS.search(line) or MACHINE_PATHS.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_scripts_are_executable_and_their_shell_parses() -> None:
    assert {"test", "check", "quickstart", "bench", "setup.sh"} <= {path.name for path in SHELL}
    for path in SHELL:
        first = path.read_text().splitlines()[0]
        assert path.suffix == ".sh" or path.stat().st_mode & 0o111, name_of(path)
        if "python" in first:
            continue
        shell = "sh" if first == "#!/bin/sh" else "bash"
        done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_imports_point_down_only() -> None:
    # The console script sits beside the interpreter in a virtual environment.
    beside = Path(sys.executable).with_name("lint-imports")
    program = str(beside) if beside.exists() else shutil.which("lint-imports")
    assert program, "lint-imports is not installed"
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
