"""Private symbols of PyTorch: each does what the project relies on, and one file has them all."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.autograd.graph import Node

import internlm
from internlm.utils import torch_private

ROOT = Path(internlm.__file__).parent


class _Watched(torch.autograd.Function):
    """The identity, which records in both directions whether it runs within a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[str]) -> Tensor:
        ctx.seen = seen
        seen.append(f"forward {torch_private.in_backward()}")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        torch_private.at_end_of_backward(lambda: ctx.seen.append("end"))
        ctx.seen.append(f"backward {torch_private.in_backward()}")
        return dy, None


# -- autograd


def test_a_backward_pass_is_told_from_a_forward_pass_and_its_end_is_seen() -> None:
    seen: list[str] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: seen.append("gradient of the input"))
    _Watched.apply(x, seen).sum().backward()
    assert seen == ["forward False", "backward True", "gradient of the input", "end"]
    assert not torch_private.in_backward()


def test_a_recomputed_forward_runs_within_the_backward_pass() -> None:
    seen: list[str] = []
    x = torch.ones(2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: _Watched.apply(x, seen).sin(), x, use_reentrant=False)
    y.sum().backward()
    assert [event for event in seen if event != "end"] == ["forward False", "forward True", "backward True"]


def test_a_backward_pass_that_raises_drops_its_callbacks() -> None:
    seen: list[str] = []

    def fail(_: Tensor) -> None:
        raise ArithmeticError

    x = torch.ones(2, requires_grad=True)
    x.register_hook(fail)
    with pytest.raises(ArithmeticError):
        _Watched.apply(x, seen).sum().backward()
    assert "end" not in seen
    assert not torch_private.in_backward()


# -- kernels


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_onednn_multiplies_by_the_transposed_weight() -> None:
    x, weight = torch.randn(64, 8), torch.randn(5, 8)
    torch.testing.assert_close(torch_private.onednn_linear(x, weight), x @ weight.t())
    torch.testing.assert_close(torch_private.onednn_linear(x, weight.t().contiguous().t()), x @ weight.t())
    torch.testing.assert_close(torch_private.onednn_linear(x, torch_private.onednn_weight(weight)), x @ weight.t())


def test_the_gradient_of_a_softmax_is_that_of_autograd() -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    probs, dprobs = scores.softmax(-1), torch.randn(3, 5, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(probs, scores, dprobs)
    torch.testing.assert_close(torch_private.softmax_backward(dprobs, probs.detach()), wanted)


#: Arguments after the first list, and what happens to one element.
FOREACH = {
    "foreach_copy_": (lambda other: (other,), {}, lambda x, y: y),
    "foreach_div_": (lambda other: (4.0,), {}, lambda x, y: x / 4.0),
    "foreach_lerp": (lambda other: (other, 0.25), {}, lambda x, y: x + 0.25 * (y - x)),
    "foreach_mul_": (lambda other: (0.5,), {}, lambda x, y: x * 0.5),
    "foreach_zero_": (lambda other: (), {}, lambda x, y: x * 0),
}


@pytest.mark.parametrize("name", FOREACH)
def test_kernels_over_lists_do_the_same_to_every_tensor(name: str) -> None:
    arguments, keywords, expected = FOREACH[name]
    xs, others = ([torch.randn(n, dtype=torch.float64) for n in (3, 1, 4)] for _ in range(2))
    wanted = [expected(x, other) for x, other in zip(xs, others, strict=True)]
    result = getattr(torch_private, name)(xs, *arguments(others), **keywords)
    for found, value in zip(xs if name.endswith("_") else result, wanted, strict=True):
        torch.testing.assert_close(found, value)


# -- torch.distributed


def test_the_default_store_needs_a_process_group_and_counts() -> None:
    with pytest.raises(ValueError, match="process group"):
        torch_private.default_store()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        store = torch_private.default_store()
        assert [store.add("count", 2), store.add("count", 0)] == [2, 2]
        store.set("key", "value")
        assert store.get("key") == b"value"
        assert store.check(["key"])
        assert not store.check(["another"])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("module", "name"), sorted(torch_private.CHECKPOINT_METADATA_NAMES))
def test_names_in_checkpoint_metadata_exist(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


class _Recorder(pickle.Unpickler):
    """An unpickler that records the names it resolves."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.names: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add((module, name))
        return super().find_class(module, name)


def test_the_metadata_of_a_checkpoint_refers_to_no_other_private_name(tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(3), "note": "text"}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    with (tmp_path / ".metadata").open("rb") as file:
        reader = _Recorder(file)
        reader.load()
    from_torch = {pair for pair in reader.names if pair[0].startswith(("torch.distributed.", "torch.serialization"))}
    assert ("torch.distributed.checkpoint.metadata", "Metadata") in from_torch
    assert from_torch <= torch_private.CHECKPOINT_METADATA_NAMES


# -- the compiler


class Scale(torch_private.OpaqueBase):
    """An argument that the compiler does not look into."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


def test_a_custom_operator_takes_an_opaque_object() -> None:
    torch_private.register_opaque_type(Scale, typ="reference")

    def scaled(x: Tensor, scale: Scale) -> Tensor:
        return x * scale.factor

    scaled.__annotations__ = {"x": Tensor, "scale": Scale, "return": Tensor}  # postponed annotations are strings
    operator = torch.library.custom_op("internlm_test::scaled", scaled, mutates_args=())
    assert torch.equal(operator(torch.ones(2), Scale(3.0)), torch.full((2,), 3.0))


def test_graphs_and_breaks_are_counted_and_an_uncompiled_function_breaks_with_its_reason() -> None:
    @torch_private.uncompiled("a reason of the test")
    def plain(x: Tensor) -> Tensor:
        assert not torch.compiler.is_compiling()
        return x.cos()

    def middle(x: Tensor) -> Tensor:
        return plain(x + 1) * 2

    torch_private.prepare_compiler()
    counters = torch_private.compile_counters()
    before, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    x = torch.randn(3)
    compiled = torch.compile(lambda x: middle(x.sin()) - 1, backend="eager")
    torch.testing.assert_close(compiled(x), (x.sin() + 1).cos() * 2 - 1)
    # Two graphs, one before and one after the break: without nested breaks there would be one more for ``middle``.
    assert counters["stats"]["unique_graphs"] - before == 2
    assert sum(counters["graph_break"].values()) - breaks == 1
    assert any("(reason: a reason of the test)" in text for text in counters["graph_break"])


def test_why_a_backend_failed_is_known() -> None:
    def broken(*_: object) -> None:
        raise OSError("no compiler here")

    with pytest.raises(Exception, match="no compiler here") as failure:
        torch.compile(lambda x: x + 1, backend=broken)(torch.ones(1))
    assert "no compiler here" in str(torch_private.compiler_failure(failure.value))
    assert torch_private.compiler_failure(ValueError("another error")) is None


def test_importing_it_does_not_load_the_compiler() -> None:
    script = (
        "import sys, internlm.utils.torch_private as p\n"
        "p.uncompiled('no reason')(len)\n"
        "assert p.COMPILER_MODULE not in sys.modules\n"
        "__import__(p.COMPILER_MODULE)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -- and nowhere else

#: Underscore names of nn.Module, Tensor and autograd nodes that an object of any name may be asked for.
OF_OBJECTS = {
    name
    for owner in (nn.Module(), torch.ones(1), Node, torch.optim.SGD([torch.ones(1, requires_grad=True)]))
    for name in dir(owner)
    if name.startswith("_") and not name.startswith("__")
}
#: By file: names that look like torch's and are not, or that have no public equivalent and are data of the object.
ALLOWED: dict[str, set[str]] = {
    "utils/registry.py": {"_modules"},
}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every private name of torch that a file imports, refers to, or has in a string."""
    from_torch = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            for name, alias in zip(names, node.names, strict=True):
                if name.split(".")[0] == "torch":
                    from_torch.add(alias.asname or alias.name.split(".")[0])
                    if any(map(_is_private, name.split("."))):
                        yield node.lineno, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_torch = isinstance(root, ast.Name) and root.id in from_torch
            of_module = node.attr in OF_OBJECTS and (not own or node.attr in vars(nn.Module()))
            if of_torch or of_module:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split()
            if len(words) == 1 and words[0].startswith("torch.") and any(map(_is_private, words[0].split("."))):
                yield node.lineno, node.value


def test_no_other_file_uses_a_private_name_of_torch() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "torch_private.py"
        for line, name in _private_uses(ast.parse(path.read_text(encoding="utf-8")))
        if name not in ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "from torch._dynamo.utils import counters",
        "import torch._inductor",
        "import torch.distributed as dist\ndist.distributed_c10d._get_default_store()",
        "from torch import autograd\nautograd.Variable._execution_engine",
        "x = torch._foreach_add_",
        "owner._parameters",
        "self._modules",
        'PRELOAD = ["torch._dynamo"]',
    ],
)
def test_a_private_name_would_be_found(text: str) -> None:
    assert list(_private_uses(ast.parse(text)))


@pytest.mark.parametrize("text", ["self._own", "action._replace(rank=1)", "from torch import nn", "nn.__name__"])
def test_other_names_are_not(text: str) -> None:
    assert not list(_private_uses(ast.parse(text)))
