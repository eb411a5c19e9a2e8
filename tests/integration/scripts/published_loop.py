"""A training loop of its own, in the idioms of published scripts; its config is published_config.py beside it."""

import internlm
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.monitor import initialize_monitor_manager, internevo_monitor
from internlm.train import initialize_model_and_parallel_communicator, initialize_optimizer


@internevo_monitor(feishu_alert=True, clean_run=True)
def main():
    parser = internlm.initialize.get_default_parser()
    parser.add_argument("--user_arg", type=int, default=-1)
    args = parser.parse_args()
    initialize_distributed_env(
        config=args.config, launcher=args.launcher, master_port=args.port, seed=args.seed, args_check=True
    )
    config = gpc.config
    assert config.VOCAB_SIZE == config["model"]["vocab_size"] == config.model.vocab_size
    assert "num_layers" in config.model
    assert config.data.get("no_such_key", 3) == 3
    assert dict(**config.adam)["lr"] == config.adam.lr
    assert gpc.data_parallel_size == gpc.get_world_size(ParallelMode.DATA)

    model, isp_communicator = initialize_model_and_parallel_communicator(create_model(model_type=config.model_type))
    train_dl, _ = build_train_loader_with_data_type()
    optimizer, beta2_scheduler, lr_scheduler = initialize_optimizer(model, isp_communicator)
    trainer = initialize_trainer(model, optimizer, lr_scheduler, beta2_scheduler)
    trainer.train()
    with initialize_monitor_manager(job_name=config.JOB_NAME, alert_address=None):
        for step, batch in enumerate(train_dl):
            if step == args.user_arg:
                raise RuntimeError("a bug")
            trainer.zero_grad()
            _, _, loss = trainer.execute_schedule(
                batch, forward_only=False, return_loss=True, return_output_label=False
            )
            success, grad_norm = trainer.step()
            assert success
            assert grad_norm > 0
            with open(f"losses-{gpc.get_global_rank()}", "a") as file:
                print(loss.item(), lr_scheduler.get_last_lr()[0], optimizer.param_groups[0]["lr"], file=file)
    assert beta2_scheduler.get_beta2() == config.adam.adam_beta2


main()
