"""Settings that are allowed together, but hardly meant: each is worth a warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from internlm.config.schema import Config


class Doubt(NamedTuple):
    """``text`` is said where ``arises``."""

    arises: Callable[[Config], bool]
    text: str


DOUBTS = (
    Doubt(
        lambda c: c.data.pack_sample_into_one and not c.data.use_packed_dataset,
        "data.pack_sample_into_one: without effect, since data.use_packed_dataset is False",
    ),
    Doubt(
        lambda c: c.parallel.pipeline.size == 1 and c.parallel.pipeline.mode != "1F1B",
        "parallel.pipeline.mode: a pipeline of one stage has nothing to fill, since parallel.pipeline.size is 1",
    ),
    Doubt(
        lambda c: c.parallel.pipeline.table is not None and c.parallel.pipeline.size * c.model.num_chunks == 1,
        "parallel.pipeline.table: without effect, since the model is in one piece",
    ),
    Doubt(
        lambda c: c.data.valid_every > 0 and c.data.valid_folder is None and c.data.train_folder is not None,
        "data.valid_every: nothing is validated, since data.valid_folder is not given",
    ),
)


def doubts(config: Config) -> list[str]:
    """A warning for everything about ``config`` that was hardly meant."""
    return [doubt.text for doubt in DOUBTS if doubt.arises(config)]
