"""The global context serves users and assembly alone."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "internlm"
ASSEMBLY = ("train/", "initialize/", "cli/", "verify/", "dryrun/", "core/trainer_builder.py", "core/context/")


def _names_it(file: Path) -> bool:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    named = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    return "global_context" in named | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_lower_layers_do_not_read_it() -> None:
    readers = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if _names_it(file)}
    assert "train/build_model.py" in readers
    assert not {name for name in readers if not name.startswith(ASSEMBLY)}
