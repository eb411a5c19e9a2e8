"""InternLM, 7 billion parameters, data parallel with sharded optimizer state.

Start on 8 GPUs:  torchrun --nproc_per_node=8 train.py --config configs/7B_sft.py --launcher torch
"""

JOB_NAME = "7b_train"
model_type = "INTERNLM"

SEQ_LEN = 2048
TOTAL_STEPS = 50000

# None: random data, for a first try. Else a folder tree of X.bin and X.bin.meta, its first level the dataset types.
TRAIN_FOLDER = None
VALID_FOLDER = None

ckpt = dict(
    enable_save_ckpt=False,
    save_ckpt_folder="local:llm_ckpts",
    checkpoint_every=50,
    # Go on from the newest complete checkpoint in save_ckpt_folder. To start from the weights of another run:
    # load_ckpt_info=dict(path="local:llm_ckpts/other", content=("model",), ckpt_type="internevo"),
    auto_resume=True,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_bsz=2,  # sequences in a micro-batch: a row is micro_bsz * seq_len tokens
    micro_num=4,  # micro-batches accumulated into a step, on each data-parallel rank
    total_steps=TOTAL_STEPS,
    valid_every=50,  # steps; 0: never
    valid_micro_num=4,
    pack_sample_into_one=False,  # attention stays within a sample
    skip_batches="",  # such as "100-110,200"
    rampup_batch_size="",  # such as "1 1 100": micro_num grows from 1 by 1 every 100 steps
    min_length=50,  # samples with fewer tokens are dropped
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
    mlp_ratio=8 / 3,  # 4096 * 8/3, rounded up to a multiple of 256: 11008
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=False,  # True, or a fraction of the layers: recompute activations, to save memory
    use_flash_attn=True,
)

parallel = dict(
    zero1=dict(size=-1),  # the whole data group shares one copy of the optimizer state
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1, interleaved_overlap=True),
    weight=dict(size=1),
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,
    overlap_sync_param=False,
    reduce_bucket_size=64 * 1024 * 1024,  # elements
    clip_grad_norm=1.0,
)

adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)

# Linear warm-up over 1 % of the steps, then a cosine down to eta_min.
lr_scheduler = dict(total_steps=TOTAL_STEPS, init_steps=0, warmup_ratio=0.01, eta_min=1e-5)

# Only float16 needs a loss scale.
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)

loss = dict(label_smoothing=0.0)

cudnn_deterministic = False
cudnn_benchmark = False
