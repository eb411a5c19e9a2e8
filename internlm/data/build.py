"""From the ``data`` section to loaders."""

from __future__ import annotations

from internlm.config.schema import DataConfig
from internlm.config.schema.fields import parse_rampup, parse_skip_batches
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.batch_plan import BatchPlan
from internlm.data.loader import TrainLoader, ValidLoader
from internlm.data.packing import Layout, RowShape
from internlm.data.rows import TrainRows, ValidRows
from internlm.data.sources import OneType, RandomSource, SampleSource, TokenizedSource

RANDOM_VALID_TYPE = "val"
RANDOM_VALID_SAMPLES = 200


def build_train_loader(
    data: DataConfig, vocab_size: int, seed: int, data_rank: int, data_size: int, part: GroupPosition = ALONE
) -> tuple[TrainLoader, list[str]]:
    """The training loader of one data-parallel rank, and the names of the data-set types; ``part`` is its part of each
    row, where rows are split along the sequence.

    ``train_folder`` None means a random data set. Raises :class:`DataError` where the folder can't serve.
    """
    if data.train_folder is None:
        source: SampleSource = RandomSource(seed, vocab_size, data.seq_len, data.fixed_random_dataset_seqlen)
    else:
        source = _tokenized(data, data.train_folder, vocab_size)
    plan = BatchPlan(
        data.micro_num,
        data_size,
        rampup=parse_rampup(data.rampup_batch_size),
        skip=parse_skip_batches(data.skip_batches),
    )
    rows = TrainRows(source, row_shape(data), seed)
    return TrainLoader(rows, plan, data_rank, data.total_steps, data.num_worker, part), source.types


def build_valid_loaders(
    data: DataConfig, vocab_size: int, seed: int, data_rank: int, data_size: int, part: GroupPosition = ALONE
) -> dict[str, ValidLoader]:
    """The validation loaders of one data-parallel rank, by data-set type.

    Without folders for training and validation, one of random data; with a training folder alone, none.
    Raises :class:`DataError` where the folder can't serve.
    """
    if data.valid_folder is not None:
        source: SampleSource = _tokenized(data, data.valid_folder, vocab_size)
    elif data.train_folder is None:
        fixed = data.fixed_random_dataset_seqlen
        source = RandomSource(seed + 1, vocab_size, data.seq_len, fixed, RANDOM_VALID_TYPE, RANDOM_VALID_SAMPLES)
    else:
        return {}
    micro_num = data.valid_micro_num or data.micro_num
    return {
        name: ValidLoader(
            ValidRows(OneType(source, name), row_shape(data)),
            micro_num,
            data_rank,
            data_size,
            data.valid_max_batches,
            data.num_worker,
            part,
        )
        for name in source.types
    }


def row_shape(data: DataConfig) -> RowShape:
    """How rows are laid out; ``pack_sample_into_one`` matters to packed data alone."""
    if not data.use_packed_dataset:
        layout = Layout.PADDED
    else:
        layout = Layout.WINDOWS if data.pack_sample_into_one else Layout.PACKED
    return RowShape(data.seq_len, data.micro_bsz, layout)


def _tokenized(data: DataConfig, folder: str, vocab_size: int) -> TokenizedSource:
    return TokenizedSource(
        folder.removeprefix("local:"), data.min_length, vocab_size, data.shm_path if data.use_shm else None
    )
