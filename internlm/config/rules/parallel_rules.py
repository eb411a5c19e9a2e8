"""Rules about process groups: sizes, pipeline schedule, and requirements of each parallel mode."""

from __future__ import annotations

import math
from collections.abc import Iterator

from internlm.config import keys
from internlm.config.rules.rule import WORLD_SIZE, Rule, RunInfo, at, divisors, listed
from internlm.config.schema import Config
from internlm.config.schema.parallel import round_size_of
from internlm.utils.errors import Problem

TENSOR, PIPELINE, WEIGHT = "parallel.tensor.size", "parallel.pipeline.size", "parallel.weight.size"
MODE = "parallel.tensor.mode"


def tensor_size_divides_heads(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the numbers of query and key/value heads are divisible by the tensor-parallel size.

    Under isp, the size may also be a multiple of the number of key/value heads.
    """
    size, heads, kv_heads = config.parallel.tensor.size, config.model.num_attention_heads, config.model.kv_heads
    isp = config.parallel.tensor.mode == "isp"
    # isp: the all-to-all around attention moves whole heads (DeepSpeed-Ulysses, arXiv 2309.14509).
    if heads % size or (kv_heads % size and not (isp and size % kv_heads == 0)):
        message = (
            f"num_attention_heads = {heads} and num_kv_attention_heads = {kv_heads} are not both divisible by {size}"
        )
        repeated = [kv_heads * n for n in divisors(heads // kv_heads)] if isp else []
        yield Problem(
            TENSOR, message, f"Use one of {listed(sorted({*divisors(math.gcd(heads, kv_heads)), *repeated}))}"
        )


def tensor_size_divides_widths(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that every split width of the model is divisible by the tensor-parallel size.

    The feed-forward width is always split, the hidden size only if the embedding is split along it. Under isp, any
    width is valid.
    """
    size, mode, model = config.parallel.tensor.size, config.parallel.tensor.mode, config.model
    # isp shards the rows of each weight and pads the last shard, so any size is valid.
    if mode == "isp":
        return
    if model.intermediate_size % size:
        message = f"the feed-forward width {model.intermediate_size} is not divisible by {size}"
        yield Problem(TENSOR, message, f"Set model.multiple_of to a multiple of {size}")
    # A tied embedding is also the output head, which is always split over the (padded) vocabulary.
    if model.embed_split_hidden and not model.tie_word_embeddings and model.hidden_size % size:
        message = (
            f"model.hidden_size = {model.hidden_size}, over which the embedding is split, is not divisible by {size}"
        )
        yield Problem(TENSOR, message, "Set model.embed_split_hidden to False")


def every_stage_has_layers(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that every chunk of every pipeline stage holds at least one layer."""
    layers, stages, chunks = config.model.num_layers, config.parallel.pipeline.size, config.model.num_chunks
    if layers < stages * chunks:
        message = f"{layers} is less than pipeline.size · num_chunks = {stages} · {chunks} = {stages * chunks}"
        yield Problem("model.num_layers", message, "Use more layers, fewer stages or fewer chunks")


def world_size_is_divisible(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the world size is divisible by ``pipeline.size`` · ``tensor.size``."""
    yield from _world_problem(config, run, "tensor", config.parallel.tensor.size)


def world_size_is_divisible_by_weight(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that, under isp, the world size is divisible by ``pipeline.size`` · ``weight.size``."""
    if config.parallel.tensor.mode == "isp" and config.parallel.weight.size > 1:
        yield from _world_problem(config, run, "weight", config.parallel.weight.size)


def _world_problem(config: Config, run: RunInfo, name: str, size: int) -> Iterator[Problem]:
    # The rule is skipped without a world size; ``or 1`` satisfies the type checker.
    stages, world = config.parallel.pipeline.size, run.world_size or 1
    if world % (stages * size):
        message = (
            f"world size {world} is not divisible by pipeline.size · {name}.size = {stages} · {size} = {stages * size}"
        )
        yield Problem("parallel", message, f"Start a multiple of {stages * size} processes, or change the sizes")


def zero_size_divides_data_group(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``parallel.zero1.size`` divides the data group size (under isp: the weight-data group size)."""
    parallel, size = config.parallel, config.parallel.zero1.size
    group, inner = (
        ("weight-data", parallel.weight.size) if parallel.tensor.mode == "isp" else ("data", parallel.tensor.size)
    )
    data, rest = divmod(run.world_size or 1, parallel.pipeline.size * inner)
    # Another rule reports a remainder. A second problem would report the same mistake twice.
    if size > 0 and not rest and data % size:
        message = f"the {group} group size {data} is not divisible by {size}"
        yield Problem("parallel.zero1.size", message, f"Use one of {listed(divisors(data))}, or -1 for the whole group")


def weight_needs_isp(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that weight parallelism is used under isp only."""
    mode = config.parallel.tensor.mode
    sizes = {"weight": config.parallel.weight.size, "expert_weight": config.parallel.expert_weight.size}
    for name, size in sizes.items():
        if size > 1 and mode != "isp":
            message = f"{size} requires parallel.tensor.mode = 'isp', got {mode!r}"
            yield Problem(f"parallel.{name}.size", message, "Set parallel.tensor.mode to 'isp', or the size to 1")


def micro_batches_fill_pipeline(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that a step has at least one micro-batch per pipeline stage.

    The interleaved schedule also requires that the number of stages divides the number of micro-batches.
    """
    count, stages = config.data.micro_num, config.parallel.pipeline.size
    if config.parallel.pipeline.table is not None:  # the table fixes the number of micro-batches
        return
    if count < stages:
        yield Problem(
            "data.micro_num", f"{count} is less than parallel.pipeline.size = {stages}", f"Use at least {stages}"
        )
    elif count % round_size_of(config.parallel.pipeline, config.model.num_chunks):
        message = (
            f"{count} is not divisible by parallel.pipeline.size = {stages}, which the interleaved schedule requires"
        )
        yield Problem("data.micro_num", message, f"Use a multiple of {stages}, or model.num_chunks = 1")


def table_has_one_size(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that batch-size ramp-up is not combined with a custom schedule, which fixes the number of micro-batches."""
    table, ramp, count = config.parallel.pipeline.table, config.data.rampup_batch_size, config.data.micro_num
    if table is not None and ramp:
        message = f"{ramp!r} changes the number of micro-batches, which parallel.pipeline.table fixes at {count}"
        yield Problem("data.rampup_batch_size", message, "Remove one of the two keys")


def chunks_fit_schedule(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``model.num_chunks`` suits the schedule: 2 for ZBV, 1 for ZBH1 and GPIPE, any number for 1F1B."""
    mode, chunks = config.parallel.pipeline.mode, config.model.num_chunks
    # The V of ZB-V (arXiv 2401.10241, section 6) goes down through the ranks and up again, hence two chunks.
    expected = {"ZBV": 2, "ZBH1": 1, "GPIPE": 1}.get(mode, chunks)
    if chunks != expected:
        message = f"expected {expected} for the schedule {mode}, got {chunks}"
        yield Problem("model.num_chunks", message, "Remove it")


def partition_is_complete(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that an explicit partition has one layer count per virtual stage and adds up to ``num_layers``."""
    partition, layers = config.parallel.pipeline.partition, config.model.num_layers
    if isinstance(partition, str):
        return
    stages, chunks = config.parallel.pipeline.size, config.model.num_chunks
    where, counts = "parallel.pipeline.partition", list(partition)
    if len(partition) != stages * chunks:
        message = f"expected pipeline.size · num_chunks = {stages} · {chunks} layer counts, got {len(counts)}: {counts}"
        yield Problem(where, message, "Set one layer count per virtual stage")
    if min(partition, default=1) < 1:
        todo = "Give every virtual stage at least 1 layer"
        yield Problem(where, f"{counts} has a virtual stage without layers", todo)
    if sum(partition) != layers:
        message = f"{counts} adds up to {sum(counts)}, but model.num_layers = {layers}"
        yield Problem(where, message, f"Make the counts add up to {layers}, or change model.num_layers")


def sequence_divides(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the sequence length is divisible by ``tensor.size`` under msp, fsp and isp, which split sequences."""
    length, tensor = config.data.seq_len, config.parallel.tensor
    if tensor.mode != "mtp" and length % tensor.size:
        message = (
            f"{length} is not divisible by parallel.tensor.size = {tensor.size}, over which {tensor.mode} splits it"
        )
        yield Problem("data.seq_len", message, f"Use a multiple of {tensor.size}")


def sequence_2d_fills_tensor_group(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that 2D sequence parallelism is used under isp only, with head_size · context_size = ``tensor.size``."""
    grid, tensor = config.parallel.sequence_2D, config.parallel.tensor
    if grid.enable and tensor.mode != "isp":
        message = f"requires parallel.tensor.mode = 'isp', got {tensor.mode!r}"
        yield Problem("parallel.sequence_2D", message, "Set enable to False, or parallel.tensor.mode to 'isp'")
    product = grid.head_size * grid.context_size
    if grid.enable and product != tensor.size:
        formula = f"head_size · context_size = {grid.head_size} · {grid.context_size} = {product}"
        message = f"{formula} is not equal to tensor.size = {tensor.size}"
        yield Problem("parallel.sequence_2D", message, "Change head_size or context_size")


def fsdp_excludes_other_sharding(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``fully_shard`` is not combined with pipelines, isp, Muon, compiled blocks or fp32 norms."""
    pipeline, optimizer = config.parallel.pipeline, config.optimizer
    # A pipeline would gather each unit once per micro-batch; isp shards weights itself; Muon needs whole matrices; the
    # all-gather of a unit concatenates its parameters, which must have one dtype.
    excluded = {
        f"{PIPELINE} = {pipeline.size}": pipeline.size > 1,
        f"model.num_chunks = {config.model.num_chunks}": config.model.num_chunks > 1,
        f"{MODE} = 'isp'": config.parallel.tensor.mode == "isp",
        "model.compile = True": config.model.compile,
        "optimizer.type = 'Muon'": optimizer.type == "Muon",
        "Muon in optimizer.param_groups": any(dict(group).get("type") == "Muon" for group in optimizer.param_groups),
        "use_fp32_norm = True": config.use_fp32_norm,
    }
    for other in [other for other, is_on in excluded.items() if config.parallel.zero1.fsdp and is_on]:
        yield Problem("parallel.zero1.fsdp", f"True cannot be combined with {other}", "Use one of the two")


def experts_divide(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that each rank of an expert group holds the same number of experts."""
    experts, size = config.model.num_experts, config.parallel.expert.size
    if experts > 1 and size > 0 and experts % size:
        message = f"model.num_experts = {experts} is not divisible by {size}"
        yield Problem("parallel.expert.size", message, f"Use one of {listed(divisors(experts))}, or -1")


HEADS = at("model", "num_attention_heads", "num_kv_attention_heads")
WIDTHS = at("model", "hidden_size", "mlp_ratio", "multiple_of", "embed_split_hidden", "tie_word_embeddings")
FSDP_REFUSES = ("model.num_chunks", "model.compile", "optimizer.type", "optimizer.param_groups", "use_fp32_norm")
SEQUENCE_2D = at("parallel.sequence_2D", "enable", "head_size", "context_size")


def elastic_layouts_have_known_keys(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check the keys of all elastic layouts, since that of another world size is needed when a host is lost."""
    for entry in config.parallel.elastic:
        for key in dict(entry)["layout"]:
            if f"parallel.{key}" not in keys.fields():
                yield Problem("parallel.elastic", f"{key!r} is no key of parallel", "Example: 'tensor.size'")


RULES = (
    Rule(at("parallel", "elastic"), elastic_layouts_have_known_keys),
    Rule((TENSOR, MODE, *HEADS), tensor_size_divides_heads),
    Rule((TENSOR, MODE, *WIDTHS), tensor_size_divides_widths),
    Rule((PIPELINE, *at("model", "num_layers", "num_chunks")), every_stage_has_layers),
    Rule((PIPELINE, TENSOR, WORLD_SIZE), world_size_is_divisible),
    Rule((PIPELINE, WEIGHT, MODE, WORLD_SIZE), world_size_is_divisible_by_weight),
    Rule((PIPELINE, TENSOR, WEIGHT, MODE, "parallel.zero1.size", WORLD_SIZE), zero_size_divides_data_group),
    Rule((WEIGHT, "parallel.expert_weight.size", MODE), weight_needs_isp),
    Rule(
        (PIPELINE, *at("parallel.pipeline", "mode", "table"), "model.num_chunks", "data.micro_num"),
        micro_batches_fill_pipeline,
    ),
    Rule(("parallel.pipeline.table", "data.rampup_batch_size", "data.micro_num"), table_has_one_size),
    Rule(("parallel.pipeline.mode", "model.num_chunks"), chunks_fit_schedule),
    Rule((PIPELINE, "parallel.pipeline.partition", *at("model", "num_layers", "num_chunks")), partition_is_complete),
    Rule((TENSOR, MODE, "data.seq_len"), sequence_divides),
    Rule((TENSOR, MODE, *SEQUENCE_2D), sequence_2d_fills_tensor_group),
    Rule(("parallel.zero1.fsdp", PIPELINE, MODE, *FSDP_REFUSES), fsdp_excludes_other_sharding),
    Rule(("model.num_experts", "parallel.expert.size"), experts_divide),
)
