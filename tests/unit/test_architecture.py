"""Rules of the architecture that no linter holds: sizes and names of files, parameters, imports, comments."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "internlm"
PURE = ("model", "ops", "core/parallel", "core/scheduler", "solver", "data")

MOST_LINES, FEW_LINES = 450, 60
MEDIAN_LINES = range(110, 181)
SHARE_OF_SMALL_FILES = 0.2
REPEATED_NAMES = 4
MOST_PARAMETERS = 7
LAZY_IMPORTS = 8
COMMENTS_PER_CODE_LINE = 0.05

DEVICE_TYPES = {"cpu", "cuda", "hip", "xpu", "npu", "mps"}
TORCH_MODULES = ("torch", "torch.version", "torch.backends")
#: Files outside of ``accelerator/`` that name a device type, and why.
NAMING_DEVICES = {
    "cli/launch_options.py": "what a user types; it must not import torch",
    "cli/parsers.py": "what a user types; it must not import torch",
    "config/resolve.py": "what a user has named; it must not import torch",
    "config/rules/model_rules.py": "what a user has named; it must not import torch",
}

#: Functions whose longer signature is published, and why.
LONG_SIGNATURES = {
    "initialize/launch.py: initialize_distributed_env": "scripts call it",
    "model/decoder.py: forward": "keywords of a model, as the scheduler and users' loops pass them",
}


@cache
def sources() -> dict[str, str]:
    """Text of every file of the package by its path in it, without ``__init__.py``."""
    files = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: path.read_text() for name, path in files.items() if path.name != "__init__.py"}


@cache
def sizes() -> dict[str, int]:
    return {name: len(text.splitlines()) for name, text in sources().items()}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function, and ``file: name``."""
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}: {node.name}", node


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of all parameters but ``self`` and ``cls``."""
    named = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")]


def imported(node: ast.AST) -> list[str]:
    """Modules that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def docstring_lines(text: str) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            lines |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def lines_of_comments_and_code(text: str) -> tuple[int, int]:
    """How many lines are nothing but a comment, and how many are code; docstrings are neither."""
    comments: set[int] = set()
    code: set[int] = set()
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(comments - code), len(code - docstring_lines(text))


def test_no_setting_hides_in_the_environment() -> None:
    files = [path for folder in PURE for path in (PACKAGE / folder).rglob("*.py")]
    assert files
    assert not [path for path in files if "environ" in path.read_text()]


def test_train_script_is_short() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 40


def test_no_file_is_too_long_to_read() -> None:
    long = {name: lines for name, lines in sizes().items() if lines > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines: split them by concept"


def test_few_files_are_too_small_to_be_a_concept() -> None:
    small = [name for name, lines in sizes().items() if lines < FEW_LINES]
    share = len(small) / len(sizes())
    assert share <= SHARE_OF_SMALL_FILES, f"{share:.0%} are under {FEW_LINES} lines, merge some of: {small}"


def test_files_have_the_size_of_a_concept() -> None:
    assert round(statistics.median(sizes().values())) in MEDIAN_LINES


def test_a_file_name_names_one_file() -> None:
    names = Counter(Path(name).name for name in sizes())
    repeated = {name: count for name, count in names.items() if count > 1}
    assert len(repeated) <= REPEATED_NAMES, f"used for several files: {repeated}"


def test_no_function_takes_too_many_parameters() -> None:
    long = {name for name, function in functions() if len(parameters(function)) > MOST_PARAMETERS}
    assert not long - LONG_SIGNATURES.keys(), f"over {MOST_PARAMETERS}: group them in a kw_only dataclass"
    assert not LONG_SIGNATURES.keys() - long, "no longer long: remove them from LONG_SIGNATURES"


def test_few_imports_of_the_package_hide_in_functions() -> None:
    lazy = {
        f"{name} imports {module}"
        for name, function in functions()
        for node in ast.walk(function)
        for module in imported(node)
        if module.partition(".")[0] == "internlm"
    }
    assert len(lazy) <= LAZY_IMPORTS, f"move some to the top of their files: {sorted(lazy)}"


def names_of_devices(text: str) -> set[str]:
    """Device types that code names, as a string or as a module of torch; docstrings and comments may name any."""
    nodes = list(ast.walk(ast.parse(text)))
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    devices = {text.partition(":")[0] for text in strings}  # also "cuda:1"
    modules = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) in TORCH_MODULES}
    return DEVICE_TYPES & devices | {f"torch.{name}" for name in DEVICE_TYPES & modules}


def test_only_the_accelerator_package_names_device_types() -> None:
    naming = {name for name, text in sources().items() if names_of_devices(text)}
    outside = {name for name in naming if not name.startswith("accelerator/")}
    assert naming - outside
    assert not outside - NAMING_DEVICES.keys(), "ask for a capability of internlm.accelerator.DeviceKind instead"
    assert not NAMING_DEVICES.keys() - outside, "name no device: remove them from NAMING_DEVICES"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x.device.type == 'cuda'", {"cuda"}),
        ("torch.empty(1, device='cpu')", {"cpu"}),
        ("torch.device('cuda:1')", {"cuda"}),
        ("torch.cuda.synchronize()", {"torch.cuda"}),
        ("torch.version.hip", {"torch.hip"}),
        ("def f():\n    'Like torch.cuda.'\n    return is_host(x)  # not 'cpu'\n", set()),
    ],
)
def test_names_of_devices_are_found(text: str, names: set[str]) -> None:
    assert names_of_devices(text) == names


def test_code_has_comments_on_why() -> None:
    counts = [lines_of_comments_and_code(text) for text in sources().values()]
    comments, code = sum(count for count, _ in counts), sum(count for _, count in counts)
    assert comments / code >= COMMENTS_PER_CODE_LINE, f"{comments} lines of comments for {code} lines of code"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", (0, 1)),
        ("# why\nx = 1  # beside code\n", (1, 1)),
        ('"""Docstring\nof a file.\n"""\n\n#: why\nx = """a\nb"""\n', (1, 2)),
        ('def f():\n    """Docstring."""\n    # why\n    return 1\n', (1, 2)),
    ],
)
def test_comments_are_counted_by_lines_of_their_own(text: str, expected: tuple[int, int]) -> None:
    assert lines_of_comments_and_code(text) == expected
