"""What is installed: its version, its requirements, its command, and how much an import costs."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from importlinter import api
from packaging.requirements import Requirement

import internlm

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "internlm"
#: Used where they are installed, and asked for through internlm.utils.lazy.
OPTIONAL = {"flash_attn"}


def _required(*names: str) -> list[Requirement]:
    lines = [line for name in names for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines() if line]
    return [Requirement(line) for line in lines]


def _imported(file: Path) -> set[str]:
    """First components of the absolute imports of a file, but for those that only a type checker reads."""
    tree = ast.parse(file.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


def test_the_installed_version_is_the_packages() -> None:
    assert metadata.version("InternEvo") == internlm.__version__


def test_the_command_exists() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="internlm")
    assert command.value == "internlm.cli.main:main"
    assert callable(command.load())


@pytest.mark.parametrize("name", ["torch", "runtime", "test", "docs"])
def test_requirements_are_exact(name: str) -> None:
    for requirement in _required(name):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement


def test_the_pinned_torch_is_one_that_the_package_accepts() -> None:
    (constant,) = re.findall(r'^TORCH = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    accepted, (pinned,) = Requirement(constant), _required("torch")
    (version,) = (specifier.version for specifier in pinned.specifier)
    assert accepted.name == pinned.name
    assert accepted.specifier.contains(version)


def test_every_import_is_required() -> None:
    homes = metadata.packages_distributions()
    declared = {requirement.name for requirement in _required("torch", "runtime")}
    imported = set().union(*map(_imported, PACKAGE.rglob("*.py")))
    others = imported - set(sys.stdlib_module_names) - OPTIONAL - {"internlm"}
    undeclared = {name for name in others if not declared & set(homes.get(name, []))}
    assert not undeclared


def test_importing_the_package_is_cheap() -> None:
    """The same holds for all that the command's help and its argument errors need."""
    modules = ", ".join(f"internlm.utils.{name}" for name in ("common", "errors", "lazy", "logger", "registry"))
    loaded = "sorted(name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules)"
    code = f"import sys, internlm, {modules}; print({loaded})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_package_has_a_layer() -> None:
    """A package that the layers contract doesn't name could import anything."""
    contract, *_ = api.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    named = {name.strip(" ()") for layer in contract["layers"] for name in layer.replace(":", "|").split("|")}
    parts = [*PACKAGE.iterdir(), *(PACKAGE / "core").iterdir()]
    modules = {".".join(part.relative_to(ROOT).with_suffix("").parts) for part in parts if part.name[0] != "_"}
    assert modules - {"internlm.core"} == named


def test_no_folder_of_tests_is_left_out(request: pytest.FixtureRequest) -> None:
    """By default pytest does not look into folders with names like ``dist`` and ``build``."""
    passed_over = request.config.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert "dist" in folders
    assert not [name for name in folders for pattern in passed_over if fnmatch.fnmatch(name, pattern)]
