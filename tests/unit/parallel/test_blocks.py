"""Blocks that a model declares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from internlm.core.parallel.blocks import containing_block, declared_blocks
from internlm.utils.errors import UserError


class Stack(nn.Module):
    """Two layers and a head; ``choose`` picks what it declares."""

    def __init__(self, choose: Callable[[Stack], list[nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
        self.head = nn.Linear(2, 2)
        self.choose = choose

    def blocks(self) -> list[nn.Module]:
        """What ``choose`` picks."""
        return self.choose(self)


def test_blocks_have_the_names_of_modules_and_the_declared_order() -> None:
    model = Stack(lambda m: [m.layers[1], m.layers[0]])
    assert list(declared_blocks(model).items()) == [("layers.1", model.layers[1]), ("layers.0", model.layers[0])]


def test_a_model_that_declares_none_has_none() -> None:
    assert declared_blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})) == {}


@pytest.mark.parametrize(
    "layers", [nn.ModuleList([nn.Linear(2, 2)]), nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict(), 3]
)
def test_an_attribute_of_that_name_declares_nothing(layers: object) -> None:
    model = nn.Module()
    model.blocks = layers
    assert declared_blocks(model) == {}


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda m: [nn.Linear(2, 2)], "returned a Linear that is not a submodule"),
        (lambda m: [m], "returned a Stack that is not a submodule"),
        (lambda m: None, "'NoneType' object is not iterable"),
        (lambda m: m.head, "'Linear' object is not iterable"),
        (lambda m: [[m.head]], "expected every block to be an nn.Module, got list"),
        (lambda m: [m.head, m.head], "returned 'head' twice"),
        (lambda m: [m.layers[0], m.layers[0][0]], r"returned 'layers\.0\.0', which lies within block 'layers\.0'"),
        (lambda m: [m.layers[0][0], m.layers[0]], r"returned 'layers\.0\.0', which lies within block 'layers\.0'"),
    ],
)
def test_wrong_declarations_are_refused(choose: Callable[[Stack], list[nn.Module]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        declared_blocks(Stack(choose))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.0", "layers.0"),
        ("layers.0.0", "layers.0"),
        ("layers.1.0.weight", "layers.1"),
        ("layers", "layers"),
        ("head", "head"),
        ("", ""),
    ],
)
def test_the_block_that_contains_a_module(name: str, block: str) -> None:
    assert containing_block(name, declared_blocks(Stack(lambda m: [*m.layers]))) == block
