"""Rules about how the processes share the work."""

from __future__ import annotations

import math
from collections.abc import Iterator

from internlm.config.rules.model_rules import divisors, listed
from internlm.config.rules.rule import Rule, at
from internlm.config.schema import Config
from internlm.config.support import WORLD_SIZE, Facts
from internlm.utils.errors import Problem

TENSOR, PIPELINE, WEIGHT = "parallel.tensor.size", "parallel.pipeline.size", "parallel.weight.size"
MODE = "parallel.tensor.mode"


def tensor_size_divides_heads(config: Config, facts: Facts) -> Iterator[Problem]:
    """Each rank of the tensor group holds whole heads; isp repeats kv heads that are fewer than the ranks."""
    size, heads, kv_heads = config.parallel.tensor.size, config.model.num_attention_heads, config.model.kv_heads
    isp = config.parallel.tensor.mode == "isp"
    if heads % size or (kv_heads % size and not (isp and size % kv_heads == 0)):
        what = f"{size} does not divide both num_attention_heads = {heads} and num_kv_attention_heads = {kv_heads}"
        repeated = [kv_heads * n for n in divisors(heads // kv_heads)] if isp else []
        yield Problem(TENSOR, what, f"Use one of {listed(sorted({*divisors(math.gcd(heads, kv_heads)), *repeated}))}")


def tensor_size_divides_widths(config: Config, facts: Facts) -> Iterator[Problem]:
    """Each rank of the tensor group holds equally many units of the feed-forward layer, and of the embedding where that
    is split by them."""
    size, mode, model = config.parallel.tensor.size, config.parallel.tensor.mode, config.model
    if mode == "isp":
        return
    if model.intermediate_size % size:
        what = f"{size} does not divide the intermediate width {model.intermediate_size}"
        yield Problem(TENSOR, what, f"Make model.multiple_of a multiple of {size}")
    if model.embed_split_hidden and not model.tie_word_embeddings and model.hidden_size % size:
        what = f"{size} does not divide model.hidden_size = {model.hidden_size}, by which the embedding is split"
        yield Problem(TENSOR, what, "Set model.embed_split_hidden to False")


def every_stage_has_layers(config: Config, facts: Facts) -> Iterator[Problem]:
    """Every chunk of every stage holds a layer at least."""
    layers, stages, chunks = config.model.num_layers, config.parallel.pipeline.size, config.model.num_chunks
    if layers < stages * chunks:
        what = f"{layers} is less than pipeline.size · num_chunks = {stages} · {chunks} = {stages * chunks}"
        yield Problem("model.num_layers", what, "Use more layers, fewer stages or fewer chunks")


def world_size_is_divisible(config: Config, facts: Facts) -> Iterator[Problem]:
    """world = data · pipeline · tensor."""
    yield from _world_problem(config, facts, "tensor", config.parallel.tensor.size)


def world_size_is_divisible_by_weight(config: Config, facts: Facts) -> Iterator[Problem]:
    """Under isp, world = weight-data · pipeline · weight too."""
    if config.parallel.tensor.mode == "isp" and config.parallel.weight.size > 1:
        yield from _world_problem(config, facts, "weight", config.parallel.weight.size)


def _world_problem(config: Config, facts: Facts, name: str, size: int) -> Iterator[Problem]:
    stages, world = config.parallel.pipeline.size, facts.world_size or 1
    if world % (stages * size):
        what = (
            f"world size {world} is not divisible by pipeline.size · {name}.size = {stages} · {size} = {stages * size}"
        )
        yield Problem("parallel", what, f"Start a multiple of {stages * size} processes, or change the sizes")


def zero_size_divides_data_group(config: Config, facts: Facts) -> Iterator[Problem]:
    """The ranks that share the optimizer state are a subgroup of the data group; of the weight-data group under isp."""
    parallel, size = config.parallel, config.parallel.zero1.size
    group, inner = (
        ("weight-data", parallel.weight.size) if parallel.tensor.mode == "isp" else ("data", parallel.tensor.size)
    )
    data, rest = divmod(facts.world_size or 1, parallel.pipeline.size * inner)
    if size > 0 and not rest and data % size:
        what = f"{size} does not divide the {group} group of {data} ranks"
        yield Problem("parallel.zero1.size", what, f"Use one of {listed(divisors(data))}, or -1 for the whole group")


def weight_needs_isp(config: Config, facts: Facts) -> Iterator[Problem]:
    """Weight parallelism is half of isp."""
    mode = config.parallel.tensor.mode
    sizes = {"weight": config.parallel.weight.size, "expert_weight": config.parallel.expert_weight.size}
    for name, size in sizes.items():
        if size > 1 and mode != "isp":
            what = f"{size}, but weight parallelism needs parallel.tensor.mode = 'isp', not {mode!r}"
            yield Problem(f"parallel.{name}.size", what, "Set the mode to 'isp', or the size to 1")


def micro_batches_fill_pipeline(config: Config, facts: Facts) -> Iterator[Problem]:
    """Each stage needs a micro-batch to work on; the interleaved schedule takes them in rounds of one a stage."""
    count, stages = config.data.micro_num, config.parallel.pipeline.size
    interleaved = config.model.num_chunks > 1 and config.parallel.pipeline.mode == "1F1B"
    if config.parallel.pipeline.table is not None:  # which says itself how many it has
        return
    if count < stages:
        yield Problem(
            "data.micro_num", f"{count} is less than parallel.pipeline.size = {stages}", f"Use at least {stages}"
        )
    elif interleaved and count % stages:
        what = f"{count} is not divisible by parallel.pipeline.size = {stages}, as the interleaved schedule needs"
        yield Problem("data.micro_num", what, f"Use a multiple of {stages}, or model.num_chunks = 1")


def table_has_one_size(config: Config, facts: Facts) -> Iterator[Problem]:
    """A schedule of the user's own is for one number of micro-batches."""
    table, ramp, count = config.parallel.pipeline.table, config.data.rampup_batch_size, config.data.micro_num
    if table is not None and ramp:
        what = f"{ramp!r} changes the number of micro-batches, but parallel.pipeline.table is for {count} alone"
        yield Problem("data.rampup_batch_size", what, "Remove one of them")


def chunks_fit_schedule(config: Config, facts: Facts) -> Iterator[Problem]:
    """The V of ZBV: each stage holds one chunk on the way down and one on the way up. The others have one, but 1F1B,
    which is interleaved where there are more."""
    mode, chunks = config.parallel.pipeline.mode, config.model.num_chunks
    has = {"ZBV": 2, "ZBH1": 1, "GPIPE": 1}.get(mode, chunks)
    if chunks != has:
        yield Problem("model.num_chunks", f"{chunks}, but the schedule {mode} has {has}", "Remove it")


def partition_is_whole(config: Config, facts: Facts) -> Iterator[Problem]:
    """An explicit partition names every part, and gives away every layer."""
    partition, layers = config.parallel.pipeline.partition, config.model.num_layers
    if isinstance(partition, str):
        return
    stages, chunks = config.parallel.pipeline.size, config.model.num_chunks
    where, shown = "parallel.pipeline.partition", list(partition)
    if len(partition) != stages * chunks:
        what = f"{shown} has {len(partition)} parts, but pipeline.size · num_chunks = {stages} · {chunks}"
        yield Problem(where, what, f"Give {stages * chunks} numbers")
    if min(partition, default=1) < 1:
        yield Problem(where, f"{shown} has a part without layers", "Give every part one at least")
    if sum(partition) != layers:
        yield Problem(where, f"{shown} has {sum(partition)} layers, but model.num_layers = {layers}", "Make them agree")


def sequence_divides(config: Config, facts: Facts) -> Iterator[Problem]:
    """Every mode but mtp splits sequences over the tensor group."""
    length, tensor = config.data.seq_len, config.parallel.tensor
    if tensor.mode != "mtp" and length % tensor.size:
        what = f"{length} is not divisible by parallel.tensor.size = {tensor.size}, over which {tensor.mode} splits it"
        yield Problem("data.seq_len", what, f"Use a multiple of {tensor.size}")


def sequence_2d_fills_tensor_group(config: Config, facts: Facts) -> Iterator[Problem]:
    """Heads times context is the tensor group of isp."""
    grid, tensor = config.parallel.sequence_2D, config.parallel.tensor
    if grid.enable and tensor.mode != "isp":
        what = f"needs parallel.tensor.mode = 'isp', not {tensor.mode!r}"
        yield Problem("parallel.sequence_2D", what, "Set the mode to 'isp', or sequence_2D.enable to False")
    product = grid.head_size * grid.context_size
    if grid.enable and product != tensor.size:
        formula = f"head_size · context_size = {grid.head_size} · {grid.context_size} = {product}"
        what = f"{formula} is not tensor.size = {tensor.size}"
        yield Problem("parallel.sequence_2D", what, "Change the sizes until they agree")


def fsdp_shares_whole_models(config: Config, facts: Facts) -> Iterator[Problem]:
    """``fully_shard`` gathers a unit each time it runs, sums gradients after each, splits all parameters by rows, and
    computes with all of a unit in one type."""
    pipeline, optimizer = config.parallel.pipeline, config.optimizer
    others = {
        f"{PIPELINE} = {pipeline.size}": pipeline.size > 1,
        f"model.num_chunks = {config.model.num_chunks}": config.model.num_chunks > 1,
        f"{MODE} = 'isp'": config.parallel.tensor.mode == "isp",
        "model.compile = True": config.model.compile,
        "optimizer.type = 'Muon'": optimizer.type == "Muon",
        "Muon in optimizer.param_groups": any(dict(group).get("type") == "Muon" for group in optimizer.param_groups),
        "use_fp32_norm = True": config.use_fp32_norm,
    }
    for other in [other for other, is_on in others.items() if config.parallel.zero1.fsdp and is_on]:
        yield Problem("parallel.zero1.fsdp", f"True together with {other}", "Use one of the two")


def experts_divide(config: Config, facts: Facts) -> Iterator[Problem]:
    """Each rank of the expert group holds equally many experts."""
    experts, size = config.model.num_experts, config.parallel.expert.size
    if experts > 1 and size > 0 and experts % size:
        what = f"{size} does not divide model.num_experts = {experts}"
        yield Problem("parallel.expert.size", what, f"Use one of {listed(divisors(experts))}, or -1")


HEADS = at("model", "num_attention_heads", "num_kv_attention_heads")
WIDTHS = at("model", "hidden_size", "mlp_ratio", "multiple_of", "embed_split_hidden", "tie_word_embeddings")
FSDP_REFUSES = ("model.num_chunks", "model.compile", "optimizer.type", "optimizer.param_groups", "use_fp32_norm")
SEQUENCE_2D = at("parallel.sequence_2D", "enable", "head_size", "context_size")

RULES = (
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
    Rule((PIPELINE, "parallel.pipeline.partition", *at("model", "num_layers", "num_chunks")), partition_is_whole),
    Rule((TENSOR, MODE, "data.seq_len"), sequence_divides),
    Rule((TENSOR, MODE, *SEQUENCE_2D), sequence_2d_fills_tensor_group),
    Rule(("parallel.zero1.fsdp", PIPELINE, MODE, *FSDP_REFUSES), fsdp_shares_whole_models),
    Rule(("model.num_experts", "parallel.expert.size"), experts_divide),
)
