"""The runs in which pipelines are tried: schedules, how ranks share the model, and cases. Pure.

The product of all choices would run for hours. So there is a table in which every schedule meets every other choice
once at least, several of them in each row.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from internlm.core.scheduler.actions import BACKWARD, FORWARD, WEIGHT, Action, Table
from internlm.core.scheduler.stage_layout import StageLayout
from internlm.core.scheduler.table import make_table, schedule_of, stage_layout_of
from tests.dist.tiny import DYNAMIC_NTK

#: By schedule: its mode, and with how many chunks it is tried. ``own`` is a table in a file, drawn at random.
KINDS: dict[str, list[tuple[str, int]]] = {
    "gpipe": [("GPIPE", 1)],
    "1f1b": [("1F1B", 1)],
    "interleaved": [("1F1B", 2), ("1F1B", 4)],
    "zbh1": [("ZBH1", 1)],
    "zbv": [("ZBV", 2)],
    "own": [("1F1B", 1), ("ZBV", 2), ("1F1B", 2)],
}

#: What the ranks of a stage share: how many they are, and how.
TENSOR: dict[str, tuple[int, tuple[str, ...]]] = {
    "whole": (1, ()),
    "mtp": (2, ("parallel.tensor.size=2",)),
    "msp": (2, ("parallel.tensor.size=2", "parallel.tensor.mode=msp")),
    "fsp": (2, ("parallel.tensor.size=2", "parallel.tensor.mode=fsp")),
    "isp": (2, ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2")),
    "isp, weights alone": (2, ("parallel.tensor.mode=isp", "parallel.weight.size=2")),
}
TENSOR["isp, overlapped"] = (2, (*TENSOR["isp"][1], "parallel.weight.overlap=True", "parallel.weight.memory_pool=True"))


class Place(NamedTuple):
    """Layout of the ranks: stages, layout within a stage, data-parallel ranks and ZeRO size."""

    stages: int
    tensor: str
    data: int = 1
    zero1: int = -1

    @property
    def ranks(self) -> int:
        return self.stages * TENSOR[self.tensor][0] * self.data


#: Where every schedule is tried.
PLACES = [
    Place(8, "whole"),
    Place(2, "whole", 2, 2),
    Place(2, "mtp"),
    Place(2, "msp"),
    Place(2, "fsp"),
    Place(2, "isp"),
    Place(2, "isp, overlapped"),
    Place(2, "isp, weights alone"),
    Place(4, "whole", 1, 1),
]
#: Eight ranks that share in all ways at once, for some.
MIXED = {
    "1f1b": Place(4, "mtp"),
    "interleaved": Place(4, "fsp"),
    "zbh1": Place(2, "msp", 2, 1),
    "zbv": Place(2, "isp, overlapped", 2, 2),
}

#: Rows of the widest sweep only. Eight stages are for the schedule with the longest warm-up; layouts within a stage are
#: divided among schedules that send alike.
WIDE = {
    *((kind, Place(8, "whole")) for kind in KINDS if kind != "zbv"),
    *((kind, Place(2, tensor)) for kind in KINDS for tensor in ("mtp", "fsp", "isp")),
    *((kind, Place(2, "isp, weights alone")) for kind in KINDS if kind != "gpipe"),
    *((kind, MIXED[kind]) for kind in ("1f1b", "interleaved")),
}

VOCABULARY = "model.vocab_size=67"
#: What hides mistakes, as overrides: a choice of each is made.
CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "activations": {
        "kept": (),
        "half recomputed": ("model.checkpoint=0.5",),
        "recomputed": ("model.checkpoint=True",),
    },
    "ends": {
        "plain": (),
        "tied": ("model.tie_word_embeddings=True", VOCABULARY),
        "odd, smoothed": (VOCABULARY, "loss.label_smoothing=0.1"),
        "split by words": (VOCABULARY, "model.embed_split_hidden=False", "model.embed_grad_scale=0.1"),
    },
    "samples": {
        "packed": (),
        "unpacked": ("data.use_packed_dataset=False", "loss.average=micro_batch"),
        "lopsided": ("data.train_folder={lopsided}", "data.use_packed_dataset=False", "data.micro_bsz=1"),
    },
    "layers": {
        "gated": (),
        "biases": ("model_type=INTERNLM", "model.o_bias=True"),
        "layer norms": ("model.norm_type=layernorm", "model.qkv_bias=True", "model.mlp_bias=True"),
    },
    "partition": {
        "uniform": (),
        "by parameters": ("parallel.pipeline.partition=parameters",),
        "by operations": ("parallel.pipeline.partition=flops",),
        "explicit": ("parallel.pipeline.partition={partition}",),
    },
    "waiting": {
        "late": (),
        "overlapped": ("hybrid_zero_optimizer.overlap_sync_grad=True", "parallel.pipeline.interleaved_overlap=True"),
    },
    "micro-batches": {"p": (), "2p": (), "p + 1": ()},
    "rotary base": {"one": (), "of each document": DYNAMIC_NTK},
}


class Row(NamedTuple):
    """One run."""

    kind: str
    mode: str
    chunks: int
    place: Place
    cases: dict[str, str]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank; interleaved takes whole rounds of p."""
        stages = self.place.stages
        rounds = schedule_of(self.mode, self.chunks) == "interleaved"
        more = {"p": 0, "2p": stages, "p + 1": stages if rounds else 1}
        return stages + more[self.cases["micro-batches"]]

    @property
    def wide(self) -> bool:
        """Whether only the widest sweep has it: another schedule meets its place with the same kind of messages."""
        return (self.kind, self.place) in WIDE

    @property
    def overrides(self) -> list[str]:
        place, parts = self.place, self.place.stages * self.chunks
        explicit = [1] * parts
        explicit[parts // 2] = 2
        sizes = {
            "parallel.pipeline.size": place.stages,
            "parallel.pipeline.mode": self.mode,
            "parallel.zero1.size": place.zero1,
            "model.num_chunks": self.chunks,
            "model.num_layers": parts + 1,
            "data.micro_num": self.micro_batches,
        }
        chosen = [text for what, name in self.cases.items() for text in CASES[what][name]]
        return [
            *(f"{key}={value}" for key, value in sizes.items()),
            *TENSOR[place.tensor][1],
            *(text.replace("{partition}", str(tuple(explicit))) for text in chosen),
        ]

    def table(self, seed: int) -> Table:
        """Build the table of actions that the row runs."""
        kind, stages = schedule_of(self.mode, self.chunks), self.place.stages
        if self.kind == "own":
            return random_table(random.Random(seed), stage_layout_of(kind, stages, self.chunks), self.micro_batches)
        return make_table(kind, stages, self.chunks, self.micro_batches)


def rows() -> Iterator[Row]:
    """Yield nine or ten rows of each schedule, through whose choices each kind of case goes at its own pace."""
    for k, (kind, sorts) in enumerate(KINDS.items()):
        for n, place in enumerate([*PLACES, *([MIXED[kind]] if kind in MIXED else [])]):
            cases = {
                what: list(choices)[(n + k * pace) % len(choices)] for pace, (what, choices) in enumerate(CASES.items())
            }
            yield Row(kind, *sorts[n % len(sorts)], place, cases)


ROWS = list(rows())


def random_table(rng: random.Random, cut: StageLayout, micro_batches: int) -> Table:
    """An order that nobody would choose, but that can run: always any action of which all that it needs is done. Of
    about half of all backward actions the weights come later."""
    pairs = itertools.product(range(cut.virtual_stages), range(micro_batches))
    todo = [(kind, *pair) for pair in pairs for kind in (FORWARD, BACKWARD, *[WEIGHT] * rng.randrange(2))]
    done: set[tuple[str, int, int]] = set()
    actions: list[list[Action]] = [[] for _ in range(cut.stages)]

    def can_run(kind: str, virtual: int, micro_batch: int) -> bool:
        first, last = virtual == 0, virtual == cut.virtual_stages - 1
        needs = {
            FORWARD: [] if first else [(FORWARD, virtual - 1)],
            BACKWARD: [(FORWARD, virtual)] if last else [(FORWARD, virtual), (BACKWARD, virtual + 1)],
            WEIGHT: [(BACKWARD, virtual)],
        }
        return all((*need, micro_batch) in done for need in needs[kind])

    while todo:
        chosen = rng.choice([each for each in todo if can_run(*each)])
        todo.remove(chosen)
        done.add(chosen)
        kind, virtual, micro_batch = chosen
        actions[cut.rank_of(virtual)].append(Action(kind, micro_batch, cut.chunk_of(virtual)))
    return Table("own", cut, micro_batches, tuple(map(tuple, actions)))


def draw(seed: int) -> Row:
    """The row of a seed."""
    rng = random.Random(seed)
    kind = rng.choice(list(KINDS))
    sort = rng.choice(KINDS[kind])
    places = [Place(stages, tensor, data) for stages in (2, 3, 4) for tensor in TENSOR for data in (1, 2)]
    place = rng.choice([place for place in places if place.ranks <= 6])
    return Row(kind, *sort, place, {what: rng.choice(list(choices)) for what, choices in CASES.items()})
