"""Settings that are allowed together, but hardly meant: each is worth a warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from internlm.config import keys
from internlm.config.dump import values
from internlm.config.schema import Config, OptimizerConfig


class Doubt(NamedTuple):
    """``why`` is said of those of ``keys`` that have another value than by default, where ``arises``. It is a format
    string, for the config ``c``."""

    keys: tuple[str, ...]
    arises: Callable[[Config], bool]
    why: str


def _has_muon(optimizer: OptimizerConfig) -> bool:
    return "Muon" in (optimizer.type, *(group.type for group in optimizer.param_groups))


OF_MUON = ("optimizer.momentum", "optimizer.nesterov", "optimizer.ns_steps", "optimizer.adjust_lr")

DOUBTS = (
    Doubt(
        ("data.pack_sample_into_one",),
        lambda c: not c.data.use_packed_dataset,
        "without effect, since data.use_packed_dataset is False",
    ),
    Doubt(
        ("parallel.pipeline.mode",),
        lambda c: c.parallel.pipeline.size == 1,
        "a pipeline of one stage has nothing to fill, since parallel.pipeline.size is 1",
    ),
    Doubt(
        ("parallel.pipeline.table",),
        lambda c: c.parallel.pipeline.size * c.model.num_chunks == 1,
        "without effect, since the model is in one piece",
    ),
    Doubt(
        ("data.valid_every",),
        lambda c: c.data.valid_folder is None and c.data.train_folder is not None,
        "nothing is validated, since data.valid_folder is not given",
    ),
    Doubt(OF_MUON, lambda c: not _has_muon(c.optimizer), "without effect, since nothing is trained by Muon"),
    Doubt(
        ("model.dropout_selective_checkpoint",),
        lambda c: not c.model.drop_rate,
        "without effect, since model.drop_rate is 0",
    ),
    Doubt(
        ("lr_scheduler.eta_min",),
        lambda c: c.lr_scheduler.type != "constant" and c.lr_scheduler.eta_min > c.adam.lr,
        "the learning rate rises to {c.lr_scheduler.eta_min} after its peak, since adam.lr is {c.adam.lr}",
    ),
)


def doubts(config: Config) -> list[str]:
    """A warning for everything about ``config`` that was hardly meant."""
    given, told = dict(values(config)), []
    for doubt in DOUBTS:
        chosen = [key for key in doubt.keys if given[key] != keys.fields()[key].default]
        if chosen and doubt.arises(config):
            told.append(f"{', '.join(chosen)}: {doubt.why.format(c=config)}")
    return told
