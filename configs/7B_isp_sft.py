"""InternLM, 7 billion parameters, with isp: sequences split over 2 ranks, weights over 4.

The world size must be a multiple of 4. Start on 8 GPUs:
torchrun --nproc_per_node=8 train.py --config configs/7B_isp_sft.py --launcher torch
"""

JOB_NAME = "7b_isp_train"
model_type = "INTERNLM"

SEQ_LEN = 4096  # split over the tensor group, so a multiple of its size
TOTAL_STEPS = 50000

# None: random data, for a first try. Else a folder tree of X.bin and X.bin.meta, its first level the dataset types.
TRAIN_FOLDER = None
VALID_FOLDER = None

ckpt = dict(
    enable_save_ckpt=False,
    save_ckpt_folder="local:llm_ckpts",
    checkpoint_every=50,
    auto_resume=True,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_bsz=1,
    micro_num=4,
    total_steps=TOTAL_STEPS,
    valid_every=50,
    pack_sample_into_one=False,
    min_length=50,
    train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER,
    empty_cache_and_diag_interval=200,
    diag_outlier_ratio=1.1,
)

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    vocab_size=103168,
    mlp_ratio=8 / 3,
    max_position_embeddings=SEQ_LEN,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=False,
    use_flash_attn=True,
)

parallel = dict(
    zero1=dict(size=-1),  # the whole weight-data group: world size / weight size
    # Activations are split along the sequence over these ranks; around attention they are exchanged for heads.
    tensor=dict(size=2, mode="isp"),
    pipeline=dict(size=1, interleaved_overlap=True),
    # Each linear layer is split over these ranks, and gathered just before it is used: while one layer computes, the
    # weights of the next arrive (overlap), in buffers that are used over and over (memory_pool).
    weight=dict(
        size=4,
        overlap=True,
        memory_pool=True,
        launch_allgather_before="wo",
        forward_overlap_per="layer",
    ),
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,
    overlap_sync_param=False,
    reduce_bucket_size=64 * 1024 * 1024,
    clip_grad_norm=1.0,
)

adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=TOTAL_STEPS, warmup_ratio=0.01, eta_min=1e-5)
loss = dict(label_smoothing=0.0)
