"""A small InternLM3, for tests and first tries: random data, milliseconds a step on a CPU, nothing saved."""

JOB_NAME = "debug_internlm3"
model_type = "INTERNLM3"

data = dict(seq_len=64, micro_bsz=2, micro_num=2, total_steps=20, num_worker=0)

model = dict(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    head_dim=24,
    vocab_size=256,
    multiple_of=32,
    max_position_embeddings=64,
    dtype="torch.float32",
)

hybrid_zero_optimizer = dict(clip_grad_norm=1.0)
adam = dict(lr=1e-3)
lr_scheduler = dict(warmup_ratio=0.1, eta_min=1e-4)
enable_tb = False
