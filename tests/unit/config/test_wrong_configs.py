"""Mistakes in a config give messages with the key, the value and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from internlm.config import Config
from internlm.config.foreign import Findings
from internlm.config.legacy import normalise
from internlm.config.rules import ALL_RULES, Rule, RunInfo
from internlm.utils.errors import Problem
from tests.unit.config.samples import SMALLEST, config_of, problems_of

NAN, INF = float("nan"), float("inf")

#: Changes to the smallest config -> the one problem they must give.
SINGLE_KEYS = [
    ({"model.num_layers": 0}, "model.num_layers: 0 is out of range. Set it to an integer of at least 1"),
    ({"model.num_layers": -4}, "model.num_layers: -4 is out of range"),
    ({"model.num_layers": "32"}, "model.num_layers: '32' is a string. Set it to an integer of at least 1"),
    ({"model.num_layers": 4.0}, "model.num_layers: 4.0 is a float. Set it to an integer"),
    ({"model.num_layers": True}, "model.num_layers: True is a bool. Set it to an integer"),
    ({"model.hidden_size": [64]}, "model.hidden_size: [64] is of type list. Set it to an integer"),
    ({"model.vocab_size": None}, "model.vocab_size: missing (Number of vocabulary entries). Set it to"),
    ({"model.checkpoint": 1.5}, "model.checkpoint: 1.5 is out of range. Set it to True or False, or a number of at"),
    ({"model.checkpoint": "all"}, "model.checkpoint: 'all' is unknown. Set it to True or False, or a number"),
    ({"model.drop_rate": 1.0}, "model.drop_rate: 1.0 is out of range. Set it to a number of at least 0"),
    ({"model.dtype": "torch.int8"}, "model.dtype: 'torch.int8' is unknown. Set it to one of 'torch.float16', "),
    ({"model.dtype": 16}, "model.dtype: 16 is an integer. Set it to one of 'torch.float16', "),
    ({"model.norm_type": "rms"}, "model.norm_type: 'rms' is unknown. Set it to one of 'rmsnorm', 'layernorm'"),
    ({"model.use_flash_attn": 1}, "model.use_flash_attn: 1 is an integer. Set it to True or False"),
    (
        {"model.moe_layer_kwargs": {"a": [1]}},
        "model.moe_layer_kwargs: [1] is of type list. Set it to a dict of plain values",
    ),
    ({"model.num_layer": 4}, "model.num_layer: unknown key. Did you mean 'num_layers'?"),
    ({"model.micro_bsz": 4}, "model.micro_bsz: unknown key. Set data.micro_bsz instead"),
    ({"model.zzz": 4}, "model.zzz: unknown key. Known: activation, apply_post_layer_norm, "),
    ({"model": 3}, "model: 3 is an integer. Set it to a dict with num_layers, hidden_size, num_attention_heads, vocab"),
    ({"moddle": {}}, "moddle: unknown key. Did you mean 'model'? Write names of your own in UPPER_CASE"),
    ({"parallel.overlap": 1}, "Set parallel.weight.overlap or parallel.expert_weight.overlap instead"),
    ({"model.type": "x"}, "model.type: unknown key. Did you mean 'dtype'?"),
    ({"micro_num": 4}, "micro_num: unknown key. Set data.micro_num instead (Number of micro-batches per step"),
    (
        {"data": None},
        "data: missing (Settings of datasets and batches). Set it to a dict with seq_len, micro_bsz, total_steps",
    ),
    ({"data.micro_num": 0}, "data.micro_num: 0 is out of range"),
    ({"data.diag_outlier_ratio": 0.5}, "data.diag_outlier_ratio: 0.5 is out of range. Set it to a number of at least"),
    ({"data.type": "token"}, "data.type: 'token' is unknown. Set it to one of 'tokenized', 'streaming', 'megatron', "),
    ({"data.train_folder": 3}, "data.train_folder: 3 is an integer. Set it to a string, or None"),
    ({"adam.lr": NAN}, "adam.lr: nan is not a finite number. Set it to a number of more than 0"),
    ({"adam.lr": INF}, "adam.lr: inf is not a finite number"),
    ({"adam.lr": 0}, "adam.lr: 0 is out of range"),
    ({"adam.lr": "1e-4"}, "adam.lr: '1e-4' is a string. Set it to a number of more than 0"),
    ({"adam.adam_beta1": 1.0}, "adam.adam_beta1: 1.0 is out of range. Set it to a number of at least 0 and less"),
    ({"beta2_scheduler.c": NAN}, "beta2_scheduler.c: nan is not a finite number. Set it to a number, or None"),
    ({"beta2_scheduler.cur_iter": -2}, "beta2_scheduler.cur_iter: -2 is out of range. Set it to an integer of at"),
    ({"lr_scheduler.last_epoch": -2}, "lr_scheduler.last_epoch: -2 is out of range. Set it to an integer of at least"),
    ({"lr_scheduler.warmup_ratio": 1.1}, "lr_scheduler.warmup_ratio: 1.1 is out of range"),
    ({"grad_scaler": 5}, "grad_scaler: 5 is an integer. Set it to a dict"),
    ({"grad_scaler.growth_factor": 1}, "growth_factor: 1 is out of range. Set it to a number of more than 1"),
    ({"grad_scaler.backoff_factor": 1.0}, "backoff_factor: 1.0 is out of range. Set it to a number of more than 0"),
    ({"grad_scaler.backoff_factor": 0}, "backoff_factor: 0 is out of range. Set it to a number of more than 0 and"),
    ({"grad_scaler.max_scale": INF}, "grad_scaler.max_scale: inf is not a finite number. Set it to a number of more"),
    ({"parallel.tensor.mode": "mpt"}, "parallel.tensor.mode: 'mpt' is unknown. Set it to one of 'mtp', 'msp', 'fsp'"),
    ({"parallel.tensor": "2"}, "parallel.tensor.size: '2' is a string. Set it to an integer of at least 1"),
    ({"parallel.zero1": 1.5}, "parallel.zero1.size: 1.5 is a float. Set it to an integer"),
    ({"parallel.pipeline": {"mode": "zbh2"}}, "parallel.pipeline.mode: 'ZBH2' is unknown. Set it to one of '1F1B'"),
    ({"parallel.pipeline": {"size": 2, "partition": "even"}}, "parallel.pipeline.partition: 'even' is unknown. Set"),
    (
        {"parallel.pipeline": {"size": 2, "partition": (4, 0)}},
        "parallel.pipeline.partition: [4, 0] has a virtual stage without layers. Give every virtual stage at least ",
    ),
    ({"parallel.pipeline": {"size": 2, "partition": 4}}, "parallel.pipeline.partition: 4 is an integer. Set"),
    ({"parallel.timeout": 0}, "parallel.timeout: 0 is out of range. Set it to a number of more than 0"),
    ({"parallel.timeout": -1.5}, "parallel.timeout: -1.5 is out of range. Set it to a number of more than 0"),
    ({"parallel.timeout": NAN}, "parallel.timeout: nan is not a finite number. Set it to a number of more than 0"),
    ({"parallel.pipeline": {"sze": 2}}, "parallel.pipeline.sze: unknown key. Did you mean 'size'?"),
    ({"parallel.sequence_parallel": "yes"}, "parallel.sequence_parallel: expected True or False, got 'yes'. Remove it"),
    (
        {"ckpt.load_ckpt_info": {"content": "model"}},
        "ckpt.load_ckpt_info.path: missing (Checkpoint folder: local:F",
    ),
    (
        {"ckpt.load_ckpt_info": {"path": "x", "content": ("moddle", "sampler")}},
        "ckpt.load_ckpt_info.content: 'moddle' is unknown. Set it to one or more of 'model', 'sampler', ",
    ),
    (
        {"ckpt.load_ckpt_info": {"path": "x", "content": ()}},
        "ckpt.load_ckpt_info.content: () is out of range. Set it to one or more of 'model', ",
    ),
    (
        {"ckpt.load_ckpt_folder": "x"},
        "ckpt.load_ckpt_folder: this key is deprecated and no longer read. Set ckpt.load_",
    ),
    ({"ckpt.load_model_only_folder": "x"}, "Set ckpt.load_ckpt_info = dict(path=..., content=('model',))"),
    ({"JOB_NAME": 3}, "JOB_NAME: 3 is an integer. Set it to a string"),
]

TWELVE_HEADS = {"model.hidden_size": 96, "model.num_attention_heads": 12, "model.num_kv_attention_heads": 3}

ACROSS_KEYS = [
    ({"data.type": "megatron"}, "data.train_folder: missing, but data.type is 'megatron'. Set it to the prefix of"),
    (
        {"data.train_folder": "s3://key:secret@bucket/x"},
        "data.cache_folder: missing, but data.train_folder is 's3://***@bucket/x'. Set it to a local folder",
    ),
    (
        {"data.type": "streaming", "data.tokenizer_path": "x", "data.train_folder": "y", "data.valid_folder": "s3://b"},
        "data.valid_folder: 's3://b' is not local, but data.type is 'streaming'. Copy it to a local folder, or ",
    ),
    (
        {"reduce_comm_dtype": "torch.float16", "model.dtype": "torch.bfloat16"},
        "reduce_comm_dtype: torch.float16, but model.dtype = torch.bfloat16 has no loss scale, so small gradients",
    ),
    (
        {"optimizer": {"param_groups": [{"pattern": "norm("}]}},
        "optimizer.param_groups: 'norm(' is not a valid regular expression (missing ), unterminated subpattern",
    ),
    ({"optimizer": {"param_groups": ({"lr_scale": 2},)}}, "optimizer.param_groups.pattern: missing"),
    (
        {"model.hidden_size": 60},
        "model.hidden_size: 60 is not divisible by num_attention_heads = 8. Change one of the two",
    ),
    ({"model.head_dim": 7}, "model.head_dim: 7 is odd"),
    (
        {"model.num_kv_attention_heads": 3},
        "model.num_kv_attention_heads: num_attention_heads = 8 is not divisible by 3. Use ",
    ),
    ({"model.num_kv_attention_heads": 16}, "num_attention_heads = 8 is not divisible by 16. Use one of 1, 2, 4, 8"),
    ({"model.cpu_offloading": 999}, "model.cpu_offloading: 999 is more than num_layers = 4. Use at most 4"),
    (
        {"parallel.tensor": 16},
        "parallel.tensor.size: num_attention_heads = 8 and num_kv_attention_heads = 8 are not both divisible by 16. "
        "Use one of 1, 2, 4, 8",
    ),
    (
        {"parallel.tensor": 4, "model.num_kv_attention_heads": 2},
        "num_attention_heads = 8 and num_kv_attention_heads = 2 are not both divisible by 4. Use one of 1, 2",
    ),
    (
        {"parallel.tensor": {"size": 3, "mode": "isp"}, "model.num_kv_attention_heads": 2, "data.seq_len": 15},
        "num_attention_heads = 8 and num_kv_attention_heads = 2 are not both divisible by 3. Use one of 1, 2, 4, 8",
    ),
    (
        {"parallel.tensor": {"size": 2, "mode": "isp"}, **TWELVE_HEADS},
        "num_attention_heads = 12 and num_kv_attention_heads = 3 are not both divisible by 2. Use one of 1, 3, 6, 12",
    ),
    (
        {"parallel.tensor": 8, "model.multiple_of": 4},
        "parallel.tensor.size: the feed-forward width 172 is not divisible by 8. Set model.multiple_of to a ",
    ),
    (
        {"parallel.tensor": 8, "model.hidden_size": 60, "model.head_dim": 8},
        "parallel.tensor.size: model.hidden_size = 60, over which the embedding is split, is not divisible by 8. "
        "Set model.embed_split_hidden to False",
    ),
    (
        {"parallel.pipeline": 4, "model.num_chunks": 2},
        "model.num_layers: 4 is less than pipeline.size · num_chunks = 4 · 2 = 8",
    ),
    (
        {"parallel.weight": 2},
        "parallel.weight.size: 2 requires parallel.tensor.mode = 'isp', got 'm",
    ),
    ({"parallel.expert_weight": 2}, "parallel.expert_weight.size: 2 requires parallel.tensor.mode"),
    (
        {"parallel.pipeline": 4, "data.micro_num": 2},
        "data.micro_num: 2 is less than parallel.pipeline.size = 4. Use at",
    ),
    (
        {"parallel.pipeline": 2, "model.num_chunks": 2, "data.micro_num": 3},
        "data.micro_num: 3 is not divisible by parallel.pipeline.size = 2, which the interleaved schedule",
    ),
    (
        {"parallel.pipeline": {"size": 2, "mode": "zbv"}, "model.num_chunks": 4, "model.num_layers": 8},
        "model.num_chunks: expected 2 for the schedule ZBV, got 4. Remove it",
    ),
    (
        {"parallel.pipeline": {"size": 2, "mode": "ZBH1"}, "model.num_chunks": 2},
        "model.num_chunks: expected 1 for the schedule ZBH1, got 2. Remove it",
    ),
    (
        {"parallel.pipeline": {"size": 2, "mode": "GPIPE"}, "model.num_chunks": 2},
        "model.num_chunks: expected 1 for the schedule GPIPE, got 2. Remove it",
    ),
    (
        {"parallel.pipeline": {"size": 2, "partition": (1, 1, 2)}},
        "parallel.pipeline.partition: expected pipeline.size · num_chunks = 2 · 1 layer counts, got 3: [1, 1, 2]. ",
    ),
    (
        {"parallel.pipeline": {"size": 2, "partition": [2, 2]}, "model.num_chunks": 2},
        "parallel.pipeline.partition: expected pipeline.size · num_chunks = 2 · 2 layer counts, got 2: [2, 2]. Set",
    ),
    (
        {"parallel.pipeline": {"size": 2, "partition": (3, 2)}},
        "parallel.pipeline.partition: [3, 2] adds up to 5, but model.num_layers = 4. Make the counts add up to 4",
    ),
    (
        {"parallel.tensor": {"size": 2, "mode": "msp"}, "data.seq_len": 15},
        "data.seq_len: 15 is not divisible by parallel.tensor.size = 2, over which msp splits it. Use a multiple of 2",
    ),
    (
        {"parallel.pipeline": 2, "parallel.zero1": {"fsdp": True}},
        "parallel.zero1.fsdp: True cannot be combined with parallel.pipeline.size = 2. Use one of the two",
    ),
    (
        {"model.num_chunks": 2, "parallel.zero1": {"fsdp": True}},
        "parallel.zero1.fsdp: True cannot be combined with model.num_chunks = 2. Use one of the two",
    ),
    (
        {"parallel.tensor": {"size": 1, "mode": "isp"}, "parallel.zero1": {"fsdp": True}},
        "parallel.zero1.fsdp: True cannot be combined with parallel.tensor.mode = 'isp'. Use one of the two",
    ),
    (
        {"optimizer": {"type": "Muon"}, "parallel.zero1": {"fsdp": True}},
        "parallel.zero1.fsdp: True cannot be combined with optimizer.type = 'Muon'. Use one of the two",
    ),
    (
        {"optimizer.param_groups": [{"pattern": "wo", "type": "Muon"}], "parallel.zero1": {"fsdp": True}},
        "parallel.zero1.fsdp: True cannot be combined with Muon in optimizer.param_groups. Use one of the two",
    ),
    (
        {"use_fp32_norm": True, "parallel.zero1": {"fsdp": True}},
        "parallel.zero1.fsdp: True cannot be combined with use_fp32_norm = True. Use one of the two",
    ),
    ({"data.skip_batches": "9-5"}, "data.skip_batches: the range '9-5' ends before it begins. Example: "),
    ({"data.skip_batches": "a"}, "data.skip_batches: expected a batch number or a range 'first-last', got 'a'"),
    (
        {"data.rampup_batch_size": "1 2"},
        "expected three integers of at least 1, 'start increment every', got '1 2'",
    ),
    ({"data.rampup_batch_size": "8 2 10"}, "data.rampup_batch_size: start = 8 is more than data.micro_num = 4"),
    (
        {"data.rampup_batch_size": "2 2 10", "parallel.pipeline.table": "mine.csv"},
        "data.rampup_batch_size: '2 2 10' changes the number of micro-batches, which parallel.pipeline.table fixes "
        "at 4. Remove one of the two",
    ),
    (
        {"lr_scheduler": {"init_steps": 95, "warmup_ratio": 0.1}},
        "lr_scheduler: init_steps + warmup_ratio · total_steps = 95 + 10 steps is more than total_steps = 100. "
        "Lower init_steps or warmup_ratio",
    ),
    (
        {"lr_scheduler": {"type": "wsd", "init_steps": 1, "warmup_ratio": 0.4, "decay_ratio": 0.6}},
        "lr_scheduler: init_steps + warmup_ratio · total_steps + decay_ratio · total_steps = 1 + 40 + 60 steps is "
        "more than total_steps = 100. Lower init_steps or warmup_ratio or decay_ratio",
    ),
    (
        {"model.dtype": "torch.float16", "grad_scaler": {"max_scale": 2**15}},
        "grad_scaler: fp16.initial_scale = 65536 is not between fp16.min_scale = 1 and max_scale = 32768",
    ),
    (
        {"model.dtype": "torch.half", "grad_scaler": {"fp16": {"initial_scale": 2, "min_scale": 4}}},
        "grad_scaler: fp16.initial_scale = 2 is not between fp16.min_scale = 4 and max_scale = 16777216",
    ),
    (
        {"ckpt": {"enable_save_ckpt": True, "checkpoint_every": 5}},
        "ckpt.save_ckpt_folder: missing, but ckpt.enable_save_ckpt is True",
    ),
    (
        {"ckpt": {"enable_save_ckpt": True, "save_ckpt_folder": "x"}},
        "ckpt.checkpoint_every: missing, but ckpt.enable_save_ckpt is True",
    ),
    (
        {"monitor.alert.enable_feishu_alert": True},
        "monitor.alert.feishu_alert_address: missing, but monitor.alert.enable_feishu_alert is True",
    ),
]

#: Rules about features that do not exist yet: a whole config is refused for the feature before.
OF_MISSING_FEATURES = [
    ({"model.num_experts": 4, "model.top_k": 8}, "model.top_k: 8 is more than num_experts = 4. Use at most 4"),
    (
        {"parallel.tensor": {"size": 2, "mode": "msp"}, "parallel.sequence_2D": {"enable": True, "head_size": 2}},
        "parallel.sequence_2D: requires parallel.tensor.mode = 'isp', got 'msp'",
    ),
    (
        {"parallel.tensor": {"size": 4, "mode": "isp"}, "parallel.sequence_2D": {"enable": True, "head_size": 2}},
        "parallel.sequence_2D: head_size · context_size = 2 · 1 = 2 is not equal to tensor.size = 4",
    ),
    (
        {"model.num_experts": 4, "parallel.expert": 3},
        "model.num_experts = 4 is not divisible by 3. Use one of",
    ),
]

WITH_FACTS = [
    (
        {"model.attention_backend": "varlen", "model.dtype": "torch.float32"},
        {"device_type": "cuda"},
        "model.attention_backend: 'varlen' requires a CUDA device and torch.float16 or torch.bfloat16, got cuda and "
        "torch.float32. Set it to 'auto'",
    ),
    (
        {"model.attention_backend": "blocked"},
        {"device_type": "cuda"},
        "model.attention_backend: 'blocked' requires the CPU and torch.float32 or torch.tf32 or torch.float64, got "
        "cuda and torch.bfloat16. Set it to 'auto'",
    ),
    (
        {"parallel": {"tensor": 2, "pipeline": 2}},
        {"world_size": 6},
        "parallel: world size 6 is not divisible by pipeline.size · tensor.size = 2 · 2 = 4. Start a multiple of 4",
    ),
    (
        {"parallel": {"tensor": {"size": 2, "mode": "isp"}, "weight": 4}},
        {"world_size": 6},
        "parallel: world size 6 is not divisible by pipeline.size · weight.size = 1 · 4 = 4",
    ),
    (
        {"parallel": {"zero1": 3, "tensor": 2}},
        {"world_size": 8},
        "parallel.zero1.size: the data group size 4 is not divisible by 3. Use one of 1, 2, 4, or -1",
    ),
    (
        {"parallel": {"zero1": 4, "tensor": {"size": 2, "mode": "isp"}, "weight": 4}},
        {"world_size": 8},
        "parallel.zero1.size: the weight-data group size 2 is not divisible by 4",
    ),
]


def test_the_smallest_config_is_right() -> None:
    assert problems_of({}, world_size=8, device_type="cpu") == []


@pytest.mark.parametrize(("changes", "expected"), SINGLE_KEYS + ACROSS_KEYS)
def test_one_mistake_gives_one_problem(changes: dict[str, Any], expected: str) -> None:
    problems = problems_of(changes)
    assert len(problems) == 1, problems
    assert expected in problems[0]
    assert "pydantic" not in problems[0]


@pytest.mark.parametrize(("changes", "expected"), OF_MISSING_FEATURES)
def test_rules_of_features_to_come(changes: dict[str, Any], expected: str) -> None:
    raw = config_of(changes)
    normalise(raw, Findings())
    config = Config.model_validate(raw)
    (problem,) = [problem for rule in ALL_RULES for problem in _check(rule, config)]
    assert expected in str(problem)


def _check(rule: Rule, config: Config) -> Iterator[Problem]:
    return iter(()) if {"world_size", "model.head_dim"} & set(rule.reads) else rule.check(config, RunInfo())


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.tensor": {"size": 4, "mode": "isp"}, "model.num_kv_attention_heads": 2},
        {"parallel.tensor": {"size": 8, "mode": "isp"}, "model.num_kv_attention_heads": 2},
        {"parallel.tensor": {"size": 8, "mode": "isp"}, "model.multiple_of": 4},
        {"parallel.tensor": {"size": 8, "mode": "isp"}, "model.hidden_size": 60, "model.head_dim": 8},
        {"parallel.tensor": 4, "model.multiple_of": 4},
        {"parallel.tensor": 8, "model.hidden_size": 60, "model.head_dim": 8, "model.embed_split_hidden": False},
        {"parallel.tensor": 8, "model.hidden_size": 60, "model.head_dim": 8, "model.tie_word_embeddings": True},
        {"parallel.tensor": {"size": 8, "mode": "msp"}},
        {"parallel.tensor": {"size": 2, "mode": "isp"}, "parallel.weight": 4},
        {"parallel.pipeline": {"size": 2, "partition": [3, 1]}},
        {"parallel.pipeline": {"size": 2, "partition": (1, 1, 1, 1), "mode": "zbv"}, "model.num_chunks": 1},
        {"parallel.pipeline": {"size": 2, "mode": "gpipe"}, "data.micro_num": 3},
    ],
)
def test_what_can_be_split_is_right(changes: dict[str, Any]) -> None:
    assert problems_of(changes, world_size=8) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dtype": "torch.float16", "grad_scaler": {"fp16": {"initial_scale": 4, "min_scale": 4}, "max_scale": 4}},
        {"model.dtype": "torch.bfloat16", "grad_scaler": {"max_scale": 1}},
        {"lr_scheduler": {"type": "wsd", "warmup_ratio": 0.4, "decay_ratio": 0.6}},
        {"lr_scheduler": {"type": "cosine", "warmup_ratio": 0.4, "decay_ratio": 1.0}},
    ],
)
def test_what_is_not_used_or_just_fits_is_right(changes: dict[str, Any]) -> None:
    assert problems_of(changes) == []


@pytest.mark.parametrize(("changes", "facts", "expected"), WITH_FACTS)
def test_mistakes_that_depend_on_the_run(changes: dict[str, Any], facts: dict[str, Any], expected: str) -> None:
    assert problems_of(changes) == []
    problems = problems_of(changes, **facts)
    assert len(problems) == 1, problems
    assert problems[0].startswith(expected)


def test_all_mistakes_are_reported_together() -> None:
    wrong = {
        "ckpt.load_ckpt_folder": "x",
        "model.num_layers": "4",
        "model.hidden_sizze": 3,
        "adam.lr": NAN,
        "parallel.tensor": 16,
        "data.skip_batches": "x",
    }
    where = [problem.partition(":")[0] for problem in problems_of(wrong, world_size=4)]
    assert sorted(where) == [
        "adam.lr",
        "ckpt.load_ckpt_folder",
        "data.skip_batches",
        "model.hidden_sizze",
        "model.num_layers",
        "parallel",
        "parallel.tensor.size",
    ]


def test_each_missing_section_is_reported() -> None:
    assert [problem.partition(":")[0] for problem in problems_of({"model": None, "data": None, "adam": None})] == [
        "model",
        "data",
        "adam",
    ]


def test_each_missing_key_is_reported() -> None:
    assert [problem.partition(":")[0] for problem in problems_of({"model": {}})] == [
        f"model.{name}" for name in SMALLEST["model"]
    ]


def test_a_misspelt_key_is_not_missing_as_well() -> None:
    model = {**SMALLEST["model"], "hiden_size": 64}
    del model["hidden_size"]
    assert problems_of({"model": model}) == ["model.hiden_size: unknown key. Did you mean 'hidden_size'?"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model.num_attention_heads": 0, "parallel.tensor": 3, "model.hidden_size": 96, "model.multiple_of": 96},
        {"model.mlp_ratio": 0, "parallel.tensor": 4, "model.multiple_of": 6},
        {"model.hidden_size": "60", "model.head_dim": 8, "parallel.tensor": 4},
        {"model.num_attention_heads": "8", "model.num_kv_attention_heads": 3},
        {"data.total_steps": -1, "lr_scheduler": {"init_steps": 10**6}},
        {"data.micro_num": 0, "parallel.pipeline": 4},
        {"ckpt": {"enable_save_ckpt": "yes"}},
        {"parallel.pipeline.size": 0},
    ],
)
def test_a_failed_key_silences_the_rules_that_read_it(changes: dict[str, Any]) -> None:
    assert len(problems_of(changes, world_size=12, device_type="cpu")) == 1
