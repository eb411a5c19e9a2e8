"""InternLM2, 7 billion parameters: grouped-query attention (32 query heads share 8 key/value heads) and no biases.

Start on 8 GPUs:  torchrun --nproc_per_node=8 train.py --config configs/7B_internlm2.py --launcher torch
"""

JOB_NAME = "7b_internlm2_train"
model_type = "INTERNLM2"

SEQ_LEN = 4096
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
    min_length=50,
    train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER,
    empty_cache_and_diag_interval=200,
)

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    vocab_size=92544,
    mlp_ratio=3.5,  # 14336
    max_position_embeddings=32768,
    rope_base=1000000,
    qk_interleaved=False,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=1.0,  # recompute the activations of all layers
    use_flash_attn=True,
)

parallel = dict(
    zero1=dict(size=-1),
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1, interleaved_overlap=True),
    weight=dict(size=1),
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
