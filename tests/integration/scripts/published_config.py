"""A small config in the style of published ones: variables in upper case, and keys that ask for nothing."""

JOB_NAME = "small"
VOCAB_SIZE = 128
SEQ_LEN = 32
model_type = "INTERNLM2"
ckpt = dict(
    enable_save_ckpt=False,
    save_ckpt_folder="local:ckpts",
    load_ckpt_folder="local:ckpts/",
    load_ckpt_info=dict(path="local:ckpts/xxxx", content=("model",), ckpt_type="internevo"),
    auto_resume=True,
    checkpoint_every=4,
)
data = dict(seq_len=SEQ_LEN, micro_num=1, micro_bsz=2, total_steps=3, train_folder=None, min_length=50, num_worker=0)
model = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    vocab_size=VOCAB_SIZE,
    mlp_ratio=2,
    multiple_of=32,
    dtype="torch.float32",
    num_chunks=1,
)
adam = dict(lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.0, eta_min=1e-3, last_epoch=-1)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)
hybrid_zero_optimizer = dict(overlap_sync_grad=True, zero_overlap_communication=True, clip_grad_norm=1.0)
parallel = dict(zero1=dict(size=-1), tensor=dict(size=1, mode="mtp"), pipeline=dict(size=1, interleaved_overlap=True))
monitor = dict(alert=dict(enable_feishu_alert=False, feishu_alert_address=None, alert_file_path="alerts/small.log"))
