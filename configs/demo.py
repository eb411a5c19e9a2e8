"""The demo: a small model learns the Python standard library, code and docstrings. Run it with ``make demo``."""

JOB_NAME = "demo"
model_type = "INTERNLM2"

VOCAB_SIZE = 4096  # of the tokenizer that tools/demo_corpus.py trains
SEQ_LEN = 512
TOTAL_STEPS = 560

model = dict(
    num_layers=4,
    hidden_size=256,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    vocab_size=VOCAB_SIZE,
    mlp_ratio=8 / 3,
    multiple_of=64,
    max_position_embeddings=SEQ_LEN,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_bsz=2,  # 1024 tokens a row on each rank
    micro_num=1,
    total_steps=TOTAL_STEPS,
    valid_every=280,
    valid_micro_num=1,
    train_folder="data/demo/train",
    valid_folder="data/demo/valid",
    tokenizer_path="data/demo/tokenizer.model",
    num_worker=1,
)

adam = dict(lr=3e-3, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.1)
lr_scheduler = dict(warmup_ratio=0.05, eta_min=1e-4)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)

parallel = dict(zero1=dict(size=-1))  # the optimizer's state is shared by all ranks

ckpt = dict(
    enable_save_ckpt=True,
    checkpoint_every=TOTAL_STEPS,  # the last step is always saved
    save_ckpt_folder="local:RUN/demo/checkpoints",
    auto_resume=False,  # each run of the demo learns from the start
)
