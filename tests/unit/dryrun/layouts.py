"""A small config, and layouts whose dry runs are compared with the formulas."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = dict(
    model_type="INTERNLM2",
    model=dict(
        num_layers=2, hidden_size=2048, num_attention_heads=16, vocab_size=32000, mlp_ratio=8 / 3, multiple_of=64
    ),
    data=dict(seq_len=2048, micro_bsz=2, micro_num=1, total_steps=4),
    adam=dict(lr=1e-3),
    hybrid_zero_optimizer=dict(clip_grad_norm=1.0),
    parallel=dict(zero1=dict(size=-1)),
)


def stages(size: int, *more: str) -> tuple[str, ...]:
    layers = f"model.num_layers={max(size, 4)}"
    return (f"parallel.pipeline.size={size}", f"data.micro_num={size}", layers, *more)


def split_over(mode: str, tensor: int, weight: int = 1) -> tuple[str, ...]:
    sizes = f"parallel.tensor.size={tensor}", f"parallel.weight.size={weight}"
    return (f"parallel.tensor.mode={mode}", *sizes)


ISP = (*split_over("isp", 2, 4), "parallel.weight.overlap=True")
FSDP = "parallel.zero1.fsdp=True"
UNFUSED = "model.enable_qkv_fusion=False", "model.mlp_layer_fusion=False"
LORA, OF_ROWS = "model.lora.rank=16", 'model.lora.targets=["wo", "w2"]'
#: Windows of 512 of 2048 tokens in the first of two layers.
GEMMA3 = ("model_type=GEMMA3", "model.global_layers=(1,)")

#: World, rank, and overrides. The dtype is bfloat16, as everywhere on a GPU.
LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "zero over 8": (8, 0, ()),
    "replicas, overlapped": (
        512,
        511,
        ("parallel.zero1.size=8", "hybrid_zero_optimizer.overlap_sync_param=True", "data.micro_num=2"),
    ),
    "fp16, padded rows": (8, 3, ("model.dtype=torch.float16", "data.use_packed_dataset=False")),
    "fp32, grouped queries": (8, 1, ("model.dtype=torch.float32", "model.num_kv_attention_heads=4")),
    "sdpa, padded rows": (8, 1, ("model.attention_backend=sdpa", "data.use_packed_dataset=False")),
    "muon, fp32 norms": (8, 5, ("optimizer.type=Muon", "use_fp32_norm=True")),
    "lion, all recomputed": (64, 63, ("optimizer.type=Lion", "model.checkpoint=True")),
    "offloaded": (8, 2, ("model.cpu_offloading=1",)),
    "offloaded, first of a stage's two layers": (8, 0, stages(2, "model.cpu_offloading=1")),
    "offloaded, both layers of a stage": (8, 0, stages(2, "model.cpu_offloading=2")),
    "selective, dropout": (8, 2, ("model.checkpoint=selective", "model.drop_rate=0.1")),
    "fsdp": (8, 7, (FSDP,)),
    "fsdp, offloaded": (8, 0, (FSDP, "model.cpu_offloading=2")),
    "fsdp, replicas": (16, 9, (FSDP, "parallel.zero1.size=4")),
    "parameter groups, ramp-up": (
        8,
        1,
        (
            'optimizer.param_groups=[{"pattern": "norm", "lr_scale": 0.5}]',
            'data.rampup_batch_size="1 1 2"',
            "data.micro_num=2",
        ),
    ),
    "mtp with dropout": (8, 1, (*split_over("mtp", 8), "model.drop_rate=0.1", "model.num_attention_heads=8")),
    "mtp": (1024, 517, split_over("mtp", 8)),
    "msp": (16, 3, split_over("msp", 4)),
    "fsp": (16, 3, split_over("fsp", 4)),
    "isp": (64, 5, ISP),
    "isp, pool, one tensor rank": (8, 5, (*split_over("isp", 1, 8), "parallel.weight.overlap=True")),
    "isp, fewer kv heads than ranks": (8, 3, (*split_over("isp", 8, 8), "model.num_kv_attention_heads=4")),
    "1F1B, first stage": (64, 0, stages(4)),
    "1F1B, middle stage of msp": (4096, 2050, (*stages(4, "model.checkpoint=0.5"), *split_over("msp", 2))),
    "1F1B, last stage, tied": (8, 7, (*stages(2), "model.tie_word_embeddings=True")),
    "interleaved": (8, 0, stages(2, "model.num_chunks=2")),
    "ZB-H1 of isp": (32, 31, (*stages(2, "parallel.pipeline.mode=ZBH1"), *ISP)),
    "ZB-H1, half recomputed": (8, 0, stages(2, "parallel.pipeline.mode=ZBH1", "model.checkpoint=0.5")),
    "unfused": (8, 2, UNFUSED),
    "unfused, fsp": (16, 3, (*UNFUSED, *split_over("fsp", 4), "model.num_kv_attention_heads=4")),
    "unfused, isp": (64, 5, (*UNFUSED, *ISP)),
    "unfused, fsdp": (8, 7, (*UNFUSED, FSDP)),
    "unfused, ZB-H1, half recomputed": (
        *(8, 0),
        (*UNFUSED, *stages(2, "parallel.pipeline.mode=ZBH1", "model.checkpoint=0.5")),
    ),
    "unfused with adapters, msp": (16, 3, (*UNFUSED, *split_over("msp", 4), "model.lora.rank=8")),
    "unfused with adapters, isp": (64, 5, (*UNFUSED, *ISP, "model.lora.rank=8")),
    "unfused with adapters, ZB-H1": (
        *(8, 0),
        (*UNFUSED, *stages(2, "parallel.pipeline.mode=ZBH1"), "model.lora.rank=8"),
    ),
    "OLMO2, mtp": (16, 3, ("model_type=OLMO2", *split_over("mtp", 4))),
    "OLMO2, msp, half recomputed": (16, 3, ("model_type=OLMO2", *split_over("msp", 4), "model.checkpoint=0.5")),
    "OLMO2, fsdp": (8, 1, (FSDP, "model_type=OLMO2")),
    "GEMMA3": (8, 1, GEMMA3),
    "GEMMA3, isp": (64, 5, (*ISP, *GEMMA3)),
    "GEMMA3 by sdpa": (8, 1, (*GEMMA3, "model.attention_backend=sdpa")),
    "GEMMA3 by sdpa, float32, grouped": (
        8,
        1,
        (*GEMMA3, "model.attention_backend=sdpa", "model.dtype=torch.float32", "model.num_kv_attention_heads=4"),
    ),
    "QWEN3, selective": (8, 1, ("model_type=QWEN3", "model.checkpoint=selective")),
    "BAICHUAN2": (8, 1, ("model_type=BAICHUAN2",)),
    "BAICHUAN2, isp": (64, 5, (*ISP, "model_type=BAICHUAN2", "model.vocab_size=32001")),
    "BAICHUAN2, msp, tied": (16, 3, (*split_over("msp", 4), "model_type=BAICHUAN2", "model.tie_word_embeddings=True")),
    "wide residuals, middle stage": (64, 32, (*stages(4), *split_over("fsp", 2), "model.residual_in_fp32=True")),
    "wide residuals, last stage": (8, 7, (*stages(2, "parallel.pipeline.mode=ZBH1"), "model.residual_in_fp32=True")),
    "post-norm, wide residuals": (
        8,
        1,
        ("model.apply_post_layer_norm=True", "model.norm_type=layernorm", "model.residual_in_fp32=True"),
    ),
    "adapters": (8, 2, (LORA, "model.drop_rate=0.1", "model.dropout_selective_checkpoint=False")),
    "adapters, fsdp": (16, 9, (LORA, FSDP, "parallel.zero1.size=4")),
    "adapters, mtp": (16, 3, (LORA, OF_ROWS, *split_over("mtp", 4))),
    "adapters, msp, OLMO2": (16, 3, (LORA, "model_type=OLMO2", *split_over("msp", 4))),
    "adapters, fsp, middle stage": (64, 20, (LORA, *stages(4, "model.checkpoint=0.5"), *split_over("fsp", 2))),
    "adapters, isp": (64, 5, (LORA, *ISP)),
    "adapters, ZB-H1 of isp": (32, 3, (LORA, OF_ROWS, *stages(2, "parallel.pipeline.mode=ZBH1"), *ISP)),
    "adapters, last stage, tied": (8, 7, (LORA, *stages(2, "model.tie_word_embeddings=True"), "use_fp32_norm=True")),
    "adapters, selective": (8, 0, (LORA, 'model.lora.targets=["w13"]', "model.checkpoint=selective")),
    "ZB-V": (8, 4, stages(2, "parallel.pipeline.mode=ZBV", "model.num_chunks=2")),
}

#: What these have in common with the other layouts is left to the widest sweep.
WIDE = {
    "fp32, grouped queries",
    "sdpa, padded rows",
    "lion, all recomputed",
    "offloaded, first of a stage's two layers",
    "offloaded, both layers of a stage",
    "fsdp, offloaded",
    "fsdp, replicas",
    "parameter groups, ramp-up",
    "mtp with dropout",
    "isp, pool, one tensor rank",
    "isp, fewer kv heads than ranks",
    "1F1B, first stage",
    "1F1B, last stage, tied",
    "ZB-H1, half recomputed",
    "unfused",
    "unfused, fsp",
    "unfused, fsdp",
    "unfused, ZB-H1, half recomputed",
    "unfused with adapters, msp",
    "unfused with adapters, ZB-H1",
    "OLMO2, msp, half recomputed",
    "OLMO2, fsdp",
    "GEMMA3",
    "GEMMA3 by sdpa",
    "GEMMA3 by sdpa, float32, grouped",
    "QWEN3, selective",
    "adapters, mtp",
    "adapters, msp, OLMO2",
    "adapters, fsp, middle stage",
    "adapters, isp",
    "adapters, last stage, tied",
    "adapters, selective",
    "BAICHUAN2",
    "BAICHUAN2, isp",
    "wide residuals, last stage",
    "post-norm, wide residuals",
}
