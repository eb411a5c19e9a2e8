"""Any parallel layout loads what another one saved, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.dist.tiny import TINY
from tests.dist.whole_runs import Outcome, assert_same_tensors, fit, resave, resume, saving
from tests.unit.model.test_unfused import fuse

#: Micro-batches of a global batch: every number of data-parallel ranks below divides it.
MICRO_BATCHES = 12
SEQUENCE: int = TINY["data"]["seq_len"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and modes of a layout, and further keys of ``parallel`` and ``model``."""

    ranks: int = 4
    tensor: int = 1
    mode: str = "mtp"
    weight: int = 1
    stages: int = 1
    zero: int = -1
    more: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Overrides of the config."""
        replicas = self.ranks // self.tensor // self.stages
        return [
            f"data.micro_num={MICRO_BATCHES // replicas}",
            f"parallel.tensor.size={self.tensor}",
            f"parallel.tensor.mode={self.mode}",
            f"parallel.weight.size={self.weight}",
            f"parallel.pipeline.size={self.stages}",
            f"parallel.zero1.size={self.zero}",
            *self.more,
        ]


FULLY_SHARDED = "parallel.zero1.fsdp=True"
WHOLE_EMBEDDING = "model.embed_split_hidden=False"


def _stages(mode: str) -> str:
    return f"parallel.pipeline.mode={mode}"


LAYOUTS: dict[str, Layout] = {
    "one process": Layout(ranks=1),
    "data": Layout(ranks=3),
    "data without ZeRO": Layout(ranks=2, zero=1),
    "ZeRO on half": Layout(zero=2),
    "mtp": Layout(ranks=2, tensor=2, more=(WHOLE_EMBEDDING,)),
    "msp": Layout(tensor=2, mode="msp"),
    "fsp": Layout(tensor=2, mode="fsp", zero=1),
    "isp": Layout(tensor=2, mode="isp", weight=4),
    "isp of equal sizes": Layout(tensor=2, mode="isp", weight=2),
    "isp of weights alone": Layout(ranks=3, mode="isp", weight=3),
    "1F1B": Layout(stages=2, more=("parallel.pipeline.partition=[3,2]",)),
    "interleaved": Layout(ranks=2, stages=2, more=("model.num_chunks=2",)),
    "ZB-V": Layout(tensor=2, stages=2, more=(_stages("ZBV"),)),
    "ZB-H1": Layout(ranks=3, stages=3, more=(_stages("ZBH1"),)),
    "GPipe": Layout(tensor=2, mode="isp", weight=2, stages=2, more=(_stages("GPIPE"),)),
    "fully sharded": Layout(ranks=3, more=(FULLY_SHARDED,)),
    "fully sharded over half": Layout(zero=2, more=(FULLY_SHARDED,)),
    "fully sharded msp": Layout(tensor=2, mode="msp", more=(FULLY_SHARDED,)),
    "tensor, pipeline, data": Layout(ranks=8, tensor=2, mode="msp", stages=2, more=("model.num_chunks=2",)),
}

# The vocabulary is one that no size divides, and so are the layers.
COMMON = (
    *("model_type=INTERNLM", "model.num_layers=5", "model.vocab_size=67", "model.num_kv_attention_heads=2"),
    "data.micro_bsz=1",
)


@dataclass(frozen=True)
class Kind:
    """Kind of run: keys that determine which tensors there are, and the layouts that load one another's."""

    overrides: tuple[str, ...]
    layouts: tuple[str, ...]


TIED = ("one process", "mtp", "1F1B", "ZB-V", "fully sharded msp")
KINDS: dict[str, Kind] = {
    "bfloat16": Kind(("model.dtype=torch.bfloat16",), tuple(LAYOUTS)),
    "float16": Kind(  # with a loss scale that has grown
        ("model.dtype=torch.float16", "grad_scaler.fp16.growth_interval=1"),
        ("one process", "fully sharded", "isp", "interleaved"),
    ),
    "float32": Kind(("model.dtype=torch.float32",), ("fully sharded", "msp", "ZeRO on half", "1F1B")),
    "Muon": Kind(("model.dtype=torch.bfloat16", "optimizer.type=Muon"), ("data", "mtp", "isp of equal sizes", "ZB-H1")),
    "Lion": Kind(("optimizer.type=Lion",), ("data", "fully sharded over half", "isp", "ZB-V")),
    "tied": Kind(("model.tie_word_embeddings=True", "model.dtype=torch.bfloat16"), TIED),
}

Saved = Callable[[str, str], tuple[Path, Outcome]]


def _overrides(folder: Path, kind: str, layout: str, *more: str) -> tuple[int, list[str]]:
    own = LAYOUTS[layout]
    return own.ranks, saving(folder, *COMMON, *KINDS[kind].overrides, *own.overrides, *more, total=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Function that returns the folder of a checkpoint of a kind of run that a layout saved, and the expected content.

    The first layout of a kind trains it for two steps; the others load what it saved, and save it, without a step.
    """
    runs: dict[tuple[str, str], tuple[Path, Outcome]] = {}

    def run(kind: str, layout: str) -> tuple[Path, Outcome]:
        if (kind, layout) not in runs:
            folder, first = tmp_path_factory.mktemp("saved"), KINDS[kind].layouts[0]
            if layout == first:
                trained = fit(*_overrides(folder, kind, layout), stop_after=2)
            else:
                source, trained = run(kind, first)
                load = f"ckpt.load_ckpt_info.path={source / 'ckpts' / 'step-2'}"
                resave(*_overrides(folder, kind, layout, load, "ckpt.load_ckpt_info.content=('all',)"))
            runs[kind, layout] = folder, trained
        return runs[kind, layout]

    return run


def _pairs() -> Iterator[object]:
    """Yield kind, writer and reader.

    Not wide: each layout reads the main kind that another one wrote, and the first layout of a kind reads what a later
    one wrote, which had loaded it from the first.
    """
    for name, kind in KINDS.items():
        count = len(kind.layouts)
        half = count // 2
        for i, writer in enumerate(kind.layouts):
            for j, reader in enumerate(kind.layouts):
                narrow = (j - i) % count == half if name == "bfloat16" else (i, j) == (half, 0)
                yield pytest.param(name, writer, reader, marks=[] if narrow else [pytest.mark.wide])


def _parts(samples: Tensor) -> Tensor:
    """Return the halves of rows in a global batch, in an order of their own.

    Ranks that share a row read it more than once; under isp, each of two reads a half of it.
    """
    return samples.reshape(-1, SEQUENCE // 2).unique(dim=0)


@pytest.mark.parametrize(("kind", "writer", "reader"), list(_pairs()))
def test_any_layout_loads_what_another_saved(kind: str, writer: str, reader: str, saved: Saved) -> None:
    """The state is bitwise that of the run which saved it, and the same samples follow."""
    folder, run = saved(kind, writer)
    loaded = resume(*_overrides(folder, kind, reader))
    assert_same_tensors(loaded.tensors, run.tensors)
    (rank, *_), (then, *_) = loaded.ranks, run.ranks
    assert (loaded.state, rank.optimizer, set(rank.steps)) == (run.state, then.optimizer, set(then.steps))
    for batch, expected in zip(loaded.samples, run.samples, strict=True):
        assert len(_parts(batch)) == 2 * MICRO_BATCHES
        assert torch.equal(_parts(batch), _parts(expected))


UNFUSED = ("model.enable_qkv_fusion=False", "model.mlp_layer_fusion=False")


@pytest.mark.parametrize(
    ("writer", "unfused", "reader"), [("isp", "fully sharded msp", "one process"), ("one process", "isp", "ZB-V")]
)
def test_projections_may_be_fused_in_another_way(
    writer: str, unfused: str, reader: str, saved: Saved, tmp_path: Path
) -> None:
    """Loaded into an unfused model, saved by it, and loaded into a fused one: all bits, of the optimizer too."""
    folder, run = saved("bfloat16", writer)
    load = f"ckpt.load_ckpt_info.path={folder / 'ckpts' / 'step-2'}", "ckpt.load_ckpt_info.content=('all',)"
    loaded = resave(*_overrides(tmp_path, "bfloat16", unfused, *load, *UNFUSED))
    assert {
        "model/layers.4.attention.wk.bias",
        "optimizer/main/layers.4.feed_forward.w3.weight",
    } <= loaded.tensors.keys()
    assert_same_tensors(fuse(loaded.tensors), run.tensors)
    again = resume(*_overrides(tmp_path, "bfloat16", reader))
    assert_same_tensors(again.tensors, run.tensors)


#: Kind and layout that save, kind and layout that load the model alone.
OTHER_DTYPES = [
    ("bfloat16", "one process", "float32", "fully sharded"),
    ("bfloat16", "isp", "float32", "msp"),
    ("float32", "1F1B", "bfloat16", "fully sharded msp"),
    ("float32", "fully sharded", "float16", "interleaved"),
]


@pytest.mark.parametrize(("kind", "writer", "other_kind", "reader"), OTHER_DTYPES)
def test_weights_alone_are_loaded_in_another_dtype(
    kind: str, writer: str, other_kind: str, reader: str, saved: Saved, tmp_path: Path
) -> None:
    """Rounded, or widened; main parameters, where there are any, are those of the checkpoint or of the model."""
    folder, run = saved(kind, writer)
    load = f"ckpt.load_ckpt_info.path={folder / 'ckpts' / 'step-2'}"
    ranks, overrides = _overrides(tmp_path, other_kind, reader, load, "ckpt.load_ckpt_info.content=('model',)")
    loaded = resume(ranks, overrides)
    weights = {name: tensor for name, tensor in run.tensors.items() if name.startswith("model/")}
    dtype = getattr(torch, other_kind)
    for name, tensor in weights.items():
        assert torch.equal(loaded.tensors[name], tensor.to(dtype))
        if (main := loaded.tensors.get(name.replace("model/", "optimizer/main/"))) is not None:
            assert torch.equal(main.to(dtype), tensor.to(dtype))
    assert not any(loaded.tensors[name].any() for name in loaded.tensors if name.startswith("optimizer/exp"))
    assert loaded.state["step"] == 0
