"""Pictures of the parallel modes: one decoder block on two ranks, what each holds and what they send one another.

The pictures follow from the code. Where a weight lies is read off the placements of a block that is built for each
rank; the collectives are those of :data:`internlm.costs.TABLE`; and from these two follows how every activation
lies, from the top of the block to its end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from internlm.config.schema import ModelConfig
from internlm.core.parallel.param_state import placement_of
from internlm.core.parallel.sharding import SEQUENCE_MODES, GroupPosition, Sharding, building
from internlm.costs import A2A, AG, AR, RS, TABLE
from internlm.model.blocks import Block
from internlm.model.families import FAMILIES, spec_of

MODES = {
    "mtp": "weights split by features; activations outside the linears whole on both ranks",
    "msp": "weights split by features; activations outside the linears split by tokens",
    "fsp": "as msp, but backward gathers the inputs again instead of keeping them",
    "isp": "activations split by tokens throughout; weights gathered for each product",
}

BOTH = 2  # in place of a rank: the same on both
TOKENS, FEATURES, WHOLE, SUMMANDS = "tokens", "features", "whole", "summands"

#: What a collective makes of a layout.
MOVED = {
    (AG, TOKENS): WHOLE,
    (RS, SUMMANDS): TOKENS,
    (AR, SUMMANDS): WHOLE,
    (A2A, TOKENS): FEATURES,
    (A2A, FEATURES): TOKENS,
}
#: What a product with the part of a weight makes of it, by the role of the linear.
MULTIPLIED = {("column", WHOLE): FEATURES, ("row", FEATURES): SUMMANDS}

Grid = list[list[int]]  # who holds each cell


class Step(NamedTuple):
    """An activation, and how it comes from the one before: by an operation, a weight, or the collectives of a role."""

    name: str
    features: str
    width: int
    operation: str = ""
    weight: str = ""
    moved_by: str = ""


class Weight(NamedTuple):
    """A parameter of the block; inputs down, outputs across."""

    name: str
    grid: Grid
    role: str
    is_partial: bool  # its gradient, before the optimizer sums it up


class Row(NamedTuple):
    """A step as it is drawn."""

    step: Step
    layout: str
    weight: Weight | None
    labels: list[tuple[str, str]]  # when, and which collective


HALVES = {
    "Attention": (
        Step("x", "H", 56),
        Step("norm(x)", "H", 56, weight="attention_norm"),
        Step("input of wqkv", "H", 56, moved_by="column"),
        Step("q, k, v", "G·(Q + 2)·D", 84, weight="attention.wqkv"),
        Step("q, k, v", "G·(Q + 2)·D", 84, moved_by="attention"),
        Step("heads", "G·Q·D", 56, operation="attention"),
        Step("heads", "G·Q·D", 56, moved_by="attention"),
        Step("output of wo", "H", 56, weight="attention.wo"),
        Step("x", "H", 56, operation="+", moved_by="row"),
    ),
    "Feed-forward": (
        Step("x", "H", 56),
        Step("norm(x)", "H", 56, weight="ffn_norm"),
        Step("input of w13", "H", 56, moved_by="column"),
        Step("gate, up", "2·F", 128, weight="feed_forward.w13"),
        Step("silu(gate) · up", "F", 64, operation="swiglu"),
        Step("output of w2", "H", 56, weight="feed_forward.w2"),
        Step("x", "H", 56, operation="+", moved_by="row"),
    ),
}


# -- what is drawn ----------------------------------------------------------------------------------------------------
def rows(mode: str, half: str) -> Iterator[Row]:
    """The steps that there are under ``mode``, with layouts and collectives."""
    blocks = [block(mode, rank) for rank in range(2)]
    start = layout = TOKENS if mode in SEQUENCE_MODES else WHOLE
    for step in HALVES[half]:
        weight = weight_of(blocks, step.weight) if step.weight else None
        role = weight.role if weight else step.moved_by
        forward, backward = TABLE.get((mode, role), ((), ()))
        labels = [*(("forward", each) for each in forward), *(("backward", each) for each in backward)]
        if bool(weight) != (mode == "isp" and role in ("column", "row")):  # it is the other that travels
            forward, labels = (), []
        if step.moved_by and not (labels or step.operation):
            continue
        if weight:
            layout = MULTIPLIED.get((role, layout), layout) if mode != "isp" else layout
            labels += [("step", AR)] * weight.is_partial
        else:
            for collective in forward:
                layout = MOVED[collective, layout]
        yield Row(step, layout, weight, labels)
    assert layout == start, "a block ends as the next one begins"


def block(mode: str, rank: int) -> Block:
    """A small one, as ``rank`` of two builds it."""
    sizes: Any = {"hidden_size": 4, "num_attention_heads": 2, "mlp_ratio": 1.0, "multiple_of": 2}
    config, share = ModelConfig(num_layers=1, vocab_size=2, **sizes), GroupPosition(rank, 2)
    with building(Sharding(mode, share, share)):
        return Block(spec_of(FAMILIES["INTERNLM2"], config), 0)


def weight_of(blocks: list[Block], name: str) -> Weight:
    """The parameter of a module of the block, as both ranks hold it."""
    modules = [block.get_submodule(name) for block in blocks]
    placements = [placement_of(module.weight) for module in modules]
    owners = torch.full(placements[0].global_shape, BOTH)
    for rank, placement in enumerate(placements):
        if placement.shard is not None:
            placement.shard_of(owners).fill_(rank)
    role, is_partial = getattr(modules[0], "role", ""), placements[0].partial_over is not None
    return Weight(name.rpartition(".")[2].replace("_", " "), grid(owners), role, is_partial)


def grid(owners: Tensor) -> Grid:
    """[*outputs, inputs] to inputs down, outputs across, neighbours of one owner put together."""
    across = [outputs for outputs, _ in groupby(owners.reshape(-1, owners.shape[-1]).tolist())]
    return [list(inputs) for inputs, _ in groupby(zip(*across, strict=True))]


# -- drawing ----------------------------------------------------------------------------------------------------------
WIDTH, TOP, PITCH, TALL = 900, 108, 116, 40  # px: picture; first activation; from one to the next; height of each
FILL = {0: "#6aa5e0", 1: "#f5ab5c", BOTH: "url(#both)"}
DARK, GREY, LINE = "#111827", "#6b7280", "#4b5563"
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
role="img" font-family="Helvetica, Arial, sans-serif" font-size="13">
<title>{title}</title>
<defs>
<pattern id="both" width="10" height="10" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="10" height="10" fill="{first}"/><rect width="5" height="10" fill="{second}"/></pattern>
<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="{line}"/></marker>
</defs>
<rect x="1" y="1" width="{inner}" height="{low}" rx="12" fill="#ffffff" stroke="#d1d5db"/>"""


def picture(mode: str) -> str:
    """The SVG of ``mode``."""
    halves = {title: list(rows(mode, title)) for title in HALVES}
    end = TOP + PITCH * (max(map(len, halves.values())) - 1) + TALL
    size = {"width": WIDTH, "inner": WIDTH - 2, "height": end + 92, "low": end + 90}
    title = f"{mode}: {MODES[mode]}"
    parts = [HEAD.format(title=escape(title), first=FILL[0], second=FILL[1], line=LINE, **size)]
    parts += [text(24, 36, mode, "bold", size=20), text(82, 36, MODES[mode], size=15)]
    for number, (name, each) in enumerate(halves.items()):
        parts += [text(24 + 450 * number, 76, name, "bold", size=15), *drawn(450 * number, each)]
    return "\n".join([*parts, *legend(end + 40), "</svg>", ""])


def drawn(left: int, steps: list[Row]) -> Iterator[str]:
    """Half of a block, downwards, and beside it the residual stream."""
    axis, last = left + 100, TOP + PITCH * (len(steps) - 1) + TALL / 2
    yield arrow(f"M{axis - 28},{TOP + TALL / 2} H{left + 24} V{last} H{axis - 28}")
    for number, row in enumerate(steps):
        y = TOP + PITCH * number
        yield from activation(axis, y, row)
        if number:
            yield arrow(f"M{axis},{y - PITCH + TALL} V{y}")
            yield from between(axis, y - (PITCH - TALL) / 2, row, steps[number - 1].step)


def activation(axis: float, y: float, row: Row) -> Iterator[str]:
    """Its rectangle, centred on the axis, and what it is."""
    step, x = row.step, axis - row.step.width / 2
    features = row.weight.grid if row.weight else [[0, 1]]  # of a product, split as the weight's outputs are
    cells = {TOKENS: [[0], [1]], WHOLE: [[BOTH]], FEATURES: features}
    if row.layout == SUMMANDS:
        yield from (*box(x + 5, y - 5, step.width, TALL, [[1]]), *box(x - 1, y + 1, step.width, TALL, [[0]]))
    else:
        yield from box(x, y, step.width, TALL, cells[row.layout])
    yield text(axis + 74, y + 17, step.name, "bold")
    yield text(axis + 74, y + 34, f"[T, {step.features}]", colour=GREY)


def between(axis: float, y: float, row: Row, before: Step) -> Iterator[str]:
    """What happens on the arrow whose middle is at ``y``."""
    lines = (-7, 15, 29) if row.weight else [5 + 16 * i - 8 * (len(row.labels) - 1) for i in range(len(row.labels))]
    for line, (when, collective) in zip(lines, row.labels, strict=False):
        stands_out = ("bold", DARK) if when == "forward" else ("normal", GREY)
        yield text(axis + 12, y + line, f"{when}: {collective}", *stands_out)
    if row.step.operation:
        yield text(axis - 8, y + 5, row.step.operation, anchor="end")
    if row.weight:
        yield from weight(axis, y, row, before)


def weight(axis: float, y: float, row: Row, before: Step) -> Iterator[str]:
    """A weight, at the right, and its way to the axis; a vector is drawn flat."""
    assert row.weight
    is_matrix = bool(row.weight.role)
    middle, wide, tall = axis + 272, row.step.width, before.width if is_matrix else 10
    shape = f"{before.features} × {row.step.features}" if is_matrix else row.step.features
    yield from box(middle - wide / 2, y - tall / 2, wide, tall, row.weight.grid)
    yield text(middle, y - tall / 2 - 7, row.weight.name, "bold", anchor="middle")
    yield text(middle, y + tall / 2 + 16, shape, colour=GREY, anchor="middle")
    yield arrow(f"M{middle - wide / 2},{y} H{axis + 2}")


def box(x: float, y: float, wide: float, tall: float, cells: Grid) -> Iterator[str]:
    """A tensor, coloured by who holds what."""
    height, width = tall / len(cells), wide / len(cells[0])
    for i, across in enumerate(cells):
        for j, owner in enumerate(across):
            yield rect(x + j * width, y + i * height, width, height, f'fill="{FILL[owner]}"')
    yield rect(x, y, wide, tall, f'fill="none" stroke="{LINE}"')


def legend(y: float) -> Iterator[str]:
    """What colours, directions and words mean."""
    entries = {"held by rank 0": [[0]], "by rank 1": [[1]], "by both, the same": [[BOTH]]}
    for x, (words, cells) in zip((24, 164, 268), entries.items(), strict=True):
        yield from (*box(x, y - 12, 24, 15, cells), text(x + 32, y, words))
    yield from (*box(441, y - 15, 24, 15, [[1]]), *box(436, y - 10, 24, 15, [[0]]))
    yield text(474, y, "summands, one on each")
    yield text(
        24, y + 28, "Activations: tokens down, features across. Weights: inputs down, outputs across.", colour=GREY
    )
    yield text(876, y, "step: of the gradient, once a step", colour=GREY, anchor="end")


def rect(x: float, y: float, wide: float, tall: float, style: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{tall:g}" {style}/>'


def arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


def text(
    x: float, y: float, words: str, weight: str = "normal", colour: str = DARK, anchor: str = "start", size: int = 13
) -> str:
    style = f'font-weight="{weight}" fill="{colour}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def main() -> None:
    """Write a picture for each mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for mode in MODES:
        (folder / f"{mode}.svg").write_text(picture(mode), encoding="utf-8")


if __name__ == "__main__":
    main()
