"""Every config key is read by the framework, or listed in the tables of what is not available."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from internlm.config import Config, keys
from internlm.config.schema.fields import Section
from internlm.config.support import NO_EFFECT, SUPPORTED_VALUES, UNREAD
from tests.unit.config.samples import ROOT

Keys = set[str]


def section_class(key: str) -> type[Section]:
    section = keys.item_section_of(keys.fields()[key].annotation) if key else Config
    assert section is not None
    return section


#: Dotted keys of all sections (``""`` is the whole config), by the last name of the key and by the name of the class.
SECTIONS = ["", *(key for key in keys.fields() if keys.item_section_of(keys.fields()[key].annotation))]
BY_NAME = {
    name: {key for key in SECTIONS if key.rpartition(".")[2] == name}
    for name in (k.rpartition(".")[2] for k in SECTIONS)
}
BY_CLASS = {
    section_class(key).__name__: {k for k in SECTIONS if section_class(k) is section_class(key)} for key in SECTIONS
}


def join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


class ReadKeys(ast.NodeVisitor):
    """Collects the keys that a file reads, by following sections through attributes, assignments and annotations.

    It knows no scopes: a variable of a file may be any of the sections that it is in some function.
    """

    def __init__(self, source: str) -> None:
        self.variables: dict[str, Keys] = {"config": {""}}
        self.read: Keys = set()
        tree = ast.parse(source)
        self.strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for _ in range(2):  # a use may stand above the assignment that explains it
            self.visit(tree)

    def sections(self, node: ast.AST) -> Keys:
        """Sections that an expression may be."""
        if isinstance(node, ast.Name):
            return self.variables.get(node.id, set())
        if isinstance(node, ast.Attribute):
            if node.attr == "config" and getattr(node.value, "id", getattr(node.value, "attr", "")) == "spec":
                return {"model"}  # DecoderSpec.config
            inner = {join(section, node.attr) for section in self.sections(node.value)} & set(SECTIONS)
            return inner or self.variables.get(node.attr, set()) | BY_NAME.get(node.attr, set())
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("load_config", "_resolve")
        ):
            return {""}
        return set()

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for inner_target, inner_value in zip(target.elts, value.elts, strict=False):
                self.bind(inner_target, inner_value)
        elif isinstance(target, (ast.Name, ast.Attribute)):
            self.declare(target, self.sections(value))

    def declare(self, target: ast.AST, sections: Keys) -> None:
        name = target.id if isinstance(target, ast.Name) else target.attr if isinstance(target, ast.Attribute) else ""
        if name and sections:
            self.variables.setdefault(name, set()).update(sections)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.declare(node.target, self.annotated(node.annotation))
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        if node.annotation is not None:
            self.declare(ast.Name(node.arg), self.annotated(node.annotation))

    def annotated(self, annotation: ast.AST) -> Keys:
        names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
        return {section for name in names for section in BY_CLASS.get(name, set())}

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for section in self.sections(node.value):
            self.read.update(join(section, name) for name in behind(section_class(section), node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        # getattr(section, name) reads any key that the file names in a string.
        if isinstance(node.func, ast.Name) and node.func.id == "getattr":
            for section in self.sections(node.args[0]):
                self.read.update(
                    join(section, name) for name in self.strings & set(section_class(section).model_fields)
                )
        self.generic_visit(node)


def behind(section: type[Section], name: str) -> Iterator[str]:
    """Fields that reading ``name`` of a section reads: itself, or those that a property computes with."""
    described = getattr(section, name, None)
    if isinstance(described, property):
        assert described.fget is not None
        yield from described.fget.__code__.co_names
    yield name


def framework() -> Iterator[Path]:
    inside, resolve = ROOT / "internlm/config", ROOT / "internlm/config/resolve.py"  # which reads the layouts
    return (path for path in (ROOT / "internlm").rglob("*.py") if path == resolve or inside not in path.parents)


def test_every_key_is_read_or_listed_as_not_available() -> None:
    read = {key for path in framework() for key in ReadKeys(path.read_text(encoding="utf-8")).read}
    unread = {key for key in keys.fields() if key not in SECTIONS and key not in read}
    listed = {*SUPPORTED_VALUES, *(row.key for row in NO_EFFECT), *(key for inner in UNREAD.values() for key in inner)}
    # Some refused keys have a default that is read, such as model.num_experts in the sizes of expert groups.
    assert unread - listed == set(), "read these keys somewhere, or list them in internlm/config/support.py"
    assert (listed - set(SUPPORTED_VALUES)) - unread == set(), "these keys are read: remove them from the lists"


def test_reads_are_found_through_variables_and_annotations() -> None:
    source = """
def build(parallel: ParallelConfig, config):
    pipeline, self.rate = parallel.pipeline, config.adam
    return pipeline.mode, self.rate.lr, gpc.config.enable_tb, config.model.kv_heads
"""
    read = ReadKeys(source).read
    assert {"parallel.pipeline.mode", "adam.lr", "enable_tb", "model.num_kv_attention_heads"} <= read
    assert not {"parallel.tensor.mode", "data.type"} & read
