"""Sections of published configs, family by family, with all of their keys, at sizes that train in a second."""

from __future__ import annotations

from typing import Any

from internlm.config.nested_dict import NestedDict, plain, put

#: Keys and values that all published configs share.
SECTIONS: NestedDict = {
    "JOB_NAME": "7b_train",
    "DO_ALERT": False,
    "ckpt": {
        "enable_save_ckpt": False,
        "save_ckpt_folder": "local:llm_ckpts",
        "load_ckpt_info": {"path": "local:llm_ckpts/xxxx", "content": ("model",), "ckpt_type": "internevo"},
        "auto_resume": True,
        "checkpoint_every": 50,
        "async_upload": True,
        "async_upload_tmp_folder": "/dev/shm/internlm_tmp_ckpt/",
        "oss_snapshot_freq": 25,
    },
    "data": {
        "seq_len": 64,
        "micro_num": 1,
        "micro_bsz": 2,
        "valid_micro_num": 4,
        "valid_every": 50,
        "pack_sample_into_one": False,
        "total_steps": 2,
        "skip_batches": "",
        "rampup_batch_size": "",
        "min_length": 50,
        "train_folder": None,
        "valid_folder": None,
        "empty_cache_and_diag_interval": 200,
        "diag_outlier_ratio": 1.1,
    },
    "grad_scaler": {
        "fp16": {"initial_scale": 65536, "min_scale": 1, "growth_interval": 1000},
        "growth_factor": 2,
        "backoff_factor": 0.5,
        "max_scale": 16777216,
        "hysteresis": 2,
    },
    "hybrid_zero_optimizer": {
        "overlap_sync_grad": True,
        "overlap_sync_param": False,
        "reduce_bucket_size": 536870912,
        "clip_grad_norm": 1.0,
    },
    "loss": {"label_smoothing": 0},
    "adam": {
        "lr": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_beta2_c": 0,
        "adam_eps": 1e-8,
        "weight_decay": 0.01,
    },
    "lr_scheduler": {"total_steps": 2, "init_steps": 0, "warmup_ratio": 0.01, "eta_min": 1e-5, "last_epoch": -1},
    "beta2_scheduler": {"init_beta2": 0.95, "c": 0, "cur_iter": -1},
    "use_fp32_norm": False,
    "model": {
        "checkpoint": False,
        "num_attention_heads": 4,
        "embed_split_hidden": True,
        "vocab_size": 128,
        "embed_grad_scale": 1,
        "parallel_output": True,
        "hidden_size": 32,
        "num_layers": 2,
        "mlp_ratio": 8 / 3,
        "apply_post_layer_norm": False,
        "dtype": "torch.bfloat16",
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": 1e-5,
        "use_flash_attn": True,
        "num_chunks": 1,
    },
    "parallel": {
        "zero1": {"size": -1},
        "tensor": {"size": 1, "mode": "mtp"},
        "pipeline": {"size": 1, "interleaved_overlap": True},
        "weight": {"size": 1, "overlap": True},
    },
    "cudnn_deterministic": False,
    "cudnn_benchmark": False,
    "monitor": {
        "alert": {
            "enable_feishu_alert": False,
            "feishu_alert_address": None,
            "light_monitor_address": None,
            "alert_file_path": "llm_alter/7b_train_alert.log",
        },
        "tensorboard": {"queue_max_length": 10},
    },
}

GENERATION = {
    "ckpt_folder": "/path/to/saved/ckpt", "output_folder": "/path/to/save/generation", "batch_size": 1,
    "eos_id": [2, 0], "bos_id": 1, "max_length": 100, "do_sample": True, "temperature": 1.0, "top_k": 50,
    "top_p": 1.0, "repetition_penalty": 1, "length_penalty": 1.0,
}  # fmt: skip
SEQUENCE_2D = {
    "enable": False,
    "head_size": 2,
    "context_size": 4,
    "window_size": 1,
    "device_placement_strategy": {"head_first": True, "interleaved": False},
}
GROUPED = {"model.num_kv_attention_heads": 2, "model.no_bias": True, "model.qk_interleaved": False}
EXPERTS = {
    "ckpt.load_ckpt_folder": "local:llm_ckpts/",
    "generation": GENERATION,
    "loss.moe_loss_coeff": 0.1,
    "model.moe_type": "GShard",
    "model.num_experts": 4,
    "model.top_k": 2,
    "parallel.expert": {"size": -1, "no_tp": False},
    "parallel.expert_weight": {"size": 1, "overlap": True},
}
MOE_SECTION = {
    "top_k": 2, "capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 4, "noisy_gate_policy": None,
    "drop_tokens": True, "use_rts": True,
}  # fmt: skip
VISION = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024, "hidden_size": 4096}

#: Changes to the shared sections by dotted key, of dense families, which train.
DENSE: dict[str, dict[str, Any]] = {
    "without a model type": {
        "ckpt.load_ckpt_folder": "local:llm_ckpts/",
        "generation": GENERATION,
        "hybrid_zero_optimizer.zero_overlap_communication": True,
        "hybrid_zero_optimizer.use_apex_adam": False,
    },
    "INTERNLM": {
        "model_type": "INTERNLM",
        "ckpt.load_ckpt_folder": "local:llm_ckpts/",
        "ckpt.enable_internevo2hf_ckpt": False,
        "data.use_shm": False,
        "generation": GENERATION,
        "hybrid_zero_optimizer.use_split_tensor_optim": False,
        "hybrid_zero_optimizer.all_gather_size": 536870912,
        "loss.op_type": "py_vocab_parallel",
        "model.multiple_of": 128,
        "parallel.sequence_2D": SEQUENCE_2D,
    },
    "INTERNLM2": {
        **GROUPED,
        "model_type": "INTERNLM2",
        "model.rope_base": 1000000,
        "model.max_position_embeddings": 131072,
        "model.enable_qkv_fusion": True,
        "model.use_sliding_window": False,
        "parallel.tensor.mode": "isp",
        "parallel.weight": {"size": 1, "overlap": True, "memory_pool": True, "launch_allgather_before": "wo",
                            "forward_overlap_per": "layer"},
        "parallel.zero1.fsdp": False,
        "parallel.pipeline.mode": "1f1b",
    },
    "LLAMA2": {
        **GROUPED,
        "model_type": "LLAMA2",
        "ckpt.load_ckpt_info.ckpt_type": "hf",
        "loss.op_type": "flash_vocab_parallel",
        "model.qkv_bias": False,
        "model.o_bias": False,
        "model.mlp_layer_fusion": True,
    },
    "LLAMA": {"model_type": "LLAMA", **GROUPED},
    "QWEN2": {
        **GROUPED,
        "model_type": "QWEN2",
        "model.use_sliding_window": False,
        "model.sliding_window": 32768,
        "model.max_window_layers": 28,
        "model.rope_base": 1000000,
    },
    "GEMMA": {"model_type": "GEMMA", "model.add_unit_offset": True, "model.head_dim": 256},
}  # fmt: skip

#: Changes by dotted key, of families that do not exist, with the text that must begin the first problem.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts without a model type": ({**EXPERTS, "moe": MOE_SECTION}, "model.num_experts: 4 is not available"),
    "INTERNLM_MoE": (
        {**EXPERTS, "model_type": "INTERNLM_MoE", "model.moe_use_residual": False, "model.num_shared_experts": 8},
        "model_type: 'INTERNLM_MoE', a model with experts that is not available in this version",
    ),
    "LLAVA": (
        {"model_type": "LLAVA", "data.is_multimodal": True, "data.image_size": 336, "data.patch_size": 14,
         "data.packed_length": 2048, "model.image_token_id": 200000, "model.vit_cfg": VISION,
         "model.vision_proj_cfg": VISION, "model.use_swiglu": False},
        "data.is_multimodal: True asks for training on images",
    ),
}  # fmt: skip


def published(changes: dict[str, Any]) -> NestedDict:
    """Return the shared sections with ``changes``, given by dotted key."""
    config: NestedDict = plain(SECTIONS)
    for key, value in changes.items():
        put(config, key, plain(value))
    return config
