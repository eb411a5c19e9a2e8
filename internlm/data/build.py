"""Build the data loaders from the ``data`` section of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from internlm.config.schema import DataConfig
from internlm.config.schema.fields import Rampup, is_remote, parse_rampup, parse_skip_batches
from internlm.core.parallel.sharding import ALONE, GroupPosition
from internlm.data.batch_plan import BatchPlan
from internlm.data.blend_rows import BlendRows, Mixture
from internlm.data.loader import TrainLoader, ValidLoader
from internlm.data.megatron_files import MegatronTokens
from internlm.data.packing import PackingLayout, RowShape
from internlm.data.remote_folder import RemoteFolder
from internlm.data.rows import TrainingRows, TrainRows
from internlm.data.sources import RandomSource, SampleSource
from internlm.data.token_files import TokenFormat, is_prefix
from internlm.data.tokenized_source import TOKENIZED, TokenizedSource
from internlm.data.tokenizer import check_vocabulary, load_tokenizer
from internlm.data.valid_rows import rows_by_type
from internlm.utils.errors import DataError, Problem, first_of_all_ranks
from internlm.utils.lazy import require
from internlm.utils.logger import get_logger

RANDOM_VALID_TYPE = "val"
RANDOM_VALID_SAMPLES = 200


def build_train_loader(
    data: DataConfig,
    vocab_size: int,
    seed: int,
    replica: GroupPosition,
    sequence_shard: GroupPosition = ALONE,
    round_size: int = 1,
) -> tuple[TrainLoader, list[str]]:
    """Build the training loader of one data-parallel rank.

    Args:
        data: The ``data`` section of the config; if its ``train_folder`` is None, the samples are random.
        vocab_size: Exclusive upper bound of the token ids.
        seed: Seed for shuffling and for random samples.
        replica: Position of this rank among the data-parallel ranks.
        sequence_shard: Position of this rank among the ranks that split rows along the sequence.
        round_size: Number that the micro-batches of a step are a multiple of.

    Returns:
        The loader, and the names of the dataset types.

    Raises:
        DataError: ``train_folder`` is missing, a file in it is damaged, or the tokenizer is not that of the model.
    """
    _check_folders(data)
    if data.tokenizer_path and data.train_folder and data.type != "streaming":
        # Evaluations and other tools will decode the tokens with it.
        check_vocabulary(load_tokenizer(data.tokenizer_path), vocab_size)
    plan = BatchPlan(
        step_rows=data.step_rows(replica.size),
        data_size=replica.size,
        round_size=round_size,
        rampup=_rampup_in_rows(data, replica.size),
        skip=parse_skip_batches(data.skip_batches),
    )
    rows = _train_rows(data, vocab_size, seed, plan)
    return TrainLoader(rows, plan, replica.rank, data.total_steps, data.num_worker, sequence_shard), rows.types


def build_valid_loaders(
    data: DataConfig, vocab_size: int, seed: int, replica: GroupPosition, sequence_shard: GroupPosition = ALONE
) -> dict[str, ValidLoader]:
    """Build the validation loaders of one data-parallel rank, one for each dataset type.

    Args:
        data: The ``data`` section of the config.
        vocab_size: Exclusive upper bound of the token ids.
        seed: Seed of the run; random validation samples are drawn with ``seed + 1``.
        replica: Position of this rank among the data-parallel ranks.
        sequence_shard: Position of this rank among the ranks that split rows along the sequence.

    Returns:
        Loaders by dataset type of ``valid_folder``. If neither ``valid_folder`` nor ``train_folder`` is set: one
        loader of random samples. If only ``train_folder`` is set: no loader.

    Raises:
        DataError: ``valid_folder`` is missing, a file in it is damaged, or ``min_length`` leaves no sample of a type.
    """
    _check_folders(data)
    if data.valid_folder is not None and data.type == "streaming":
        source: SampleSource = _streams().build_valid_texts(data, vocab_size)
    elif data.valid_folder is not None:
        source = _tokenized_valid(data, data.valid_folder, vocab_size)
    elif data.train_folder is None:
        # Another seed than that of training: validation on training samples would measure memorisation.
        fixed = data.fixed_random_dataset_seqlen
        source = RandomSource(seed + 1, vocab_size, data.seq_len, fixed, RANDOM_VALID_TYPE, RANDOM_VALID_SAMPLES)
    else:
        return {}
    plan = BatchPlan(step_rows=(data.valid_micro_num or data.micro_num) * replica.size, data_size=replica.size)

    return {
        type_name: ValidLoader(rows, plan, replica.rank, data.valid_max_batches, data.num_worker, sequence_shard)
        for type_name, rows in rows_by_type(source, row_shape(data)).items()
    }


def _streams() -> ModuleType:
    """Import the reader of streamed texts, whose packages other data do without."""
    return require("internlm.data.build_stream", "data.type = 'streaming'", "pip install datasets")


def _train_rows(data: DataConfig, vocab_size: int, seed: int, plan: BatchPlan) -> TrainingRows:
    if data.type == "streaming":
        rows: TrainingRows = _streams().build_stream_rows(data, row_shape(data), seed, vocab_size, plan.step_rows)
        return rows
    if data.train_folder is None:
        source: SampleSource = RandomSource(seed, vocab_size, data.seq_len, data.fixed_random_dataset_seqlen)
    else:
        source = _tokenized(data, "data.train_folder", data.train_folder, vocab_size)
    if data.weights:
        return _blend_rows(data, source, seed, plan)
    rows = TrainRows(source, row_shape(data), seed)
    if data.train_folder is not None and first_of_all_ranks("rows of an epoch"):
        get_logger().info(f"data.train_folder: {rows.description} ({rows.shape.layout.value})")
    return rows


def _blend_rows(data: DataConfig, source: SampleSource, seed: int, plan: BatchPlan) -> BlendRows:
    changes = ((0, data.weights), *((change.step, change.weights) for change in data.weight_changes))
    # An unknown type is found here, before the model is built, and so is a type that would be repeated too often.
    rows = BlendRows(source, row_shape(data), seed, Mixture(changes, data.max_epochs), data.total_steps)
    rows.check_epochs(plan)
    if first_of_all_ranks("mixture of dataset types"):
        for step, shares in rows.mixture.shares():
            parts = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
            get_logger().info(f"dataset types from step {step} on: {parts}")
        used = ", ".join(f"{name} {number:.4g}" for name, number in rows.epochs(plan).items())
        get_logger().info(f"data.train_folder: {rows.description} ({rows.shape.layout.value})")
        get_logger().info(f"epochs of the dataset types in {data.total_steps} steps: {used}")
    return rows


def _rampup_in_rows(data: DataConfig, data_size: int) -> Rampup | None:
    rampup = parse_rampup(data.rampup_batch_size)
    if rampup is None:
        return None
    # Micro-batches of one rank, or sequences of all ranks: the unit is that of the batch which the ramp-up leads to.
    if data.global_batch is None:
        return Rampup(rampup.start * data_size, rampup.increment * data_size, rampup.every)
    return Rampup(rampup.start // data.micro_bsz, rampup.increment // data.micro_bsz, rampup.every)


def row_shape(data: DataConfig) -> RowShape:
    """Return the sizes and the packing layout of a row, as set in the ``data`` section of a config.

    ``pack_sample_into_one`` has an effect only if ``use_packed_dataset`` is set.
    """
    if not data.use_packed_dataset:
        layout = PackingLayout.PADDED
    elif data.pack == "best_fit":
        layout = PackingLayout.BEST_FIT
    else:
        layout = PackingLayout.WINDOWS if data.pack_sample_into_one else PackingLayout.PACKED
    return RowShape(data.seq_len, data.micro_bsz, layout)


def _tokenized_valid(data: DataConfig, folder: str, vocab_size: int) -> TokenizedSource:
    source = _tokenized(data, "data.valid_folder", folder, vocab_size)
    if source.emptied_types:
        message = f"{data.min_length} leaves no sample of the dataset type {source.emptied_types[0]!r} in {folder}"
        raise DataError(Problem("data.min_length", message, "Lower it, or remove the folder of this type"))
    return source


def _check_folders(data: DataConfig) -> None:
    """Raise for all folders that are missing, of training and of validation, since each attempt costs a start."""
    folders = {"data.train_folder": data.train_folder, "data.valid_folder": data.valid_folder}
    # Here rather than where each is opened: whoever has moved a data set has moved both.
    local = {key: folder for key, folder in folders.items() if folder and not is_remote(folder)}
    missing = {key: folder for key, folder in local.items() if not _exists(data, _local(folder))}
    if missing:
        todo = "Set {} to an existing folder"
        raise DataError(*(Problem(folder, "no such folder", todo.format(key)) for key, folder in missing.items()))


def _exists(data: DataConfig, path: Path) -> bool:
    return path.is_dir() or is_prefix(path, _formats(data))


def _formats(data: DataConfig) -> Sequence[TokenFormat]:
    return (MegatronTokens(),) if data.type == "megatron" else TOKENIZED


def _remote(data: DataConfig, folder: str) -> RemoteFolder | None:
    if not is_remote(folder):
        return None
    if data.cache_folder is None:  # a script may have made its config without the rules
        message, todo = f"missing, but the data are at {folder}", "Set it to a local folder"
        raise DataError(Problem("data.cache_folder", message, todo))
    return RemoteFolder(folder, _local(data.cache_folder), int(data.cache_gib * 2**30))


def _local(folder: str) -> Path:
    return Path(folder.removeprefix("local:"))


def _tokenized(data: DataConfig, key: str, folder: str, vocab_size: int) -> TokenizedSource:
    remote = _remote(data, folder)
    source = TokenizedSource(
        str(_local(folder) if remote is None else remote.folder),
        data.min_length,
        vocab_size,
        data.shm_path if data.use_shm else None,
        level=data.fingerprint,
        formats=_formats(data),
        remote=remote,
    )
    if source.dropped and first_of_all_ranks(f"samples dropped: {key}"):
        every = source.dropped + len(source.lengths)
        short = f"{source.dropped} of {every} samples have fewer than data.min_length = {data.min_length} tokens"
        get_logger().info(f"{key}: {short} and are dropped")
    return source
