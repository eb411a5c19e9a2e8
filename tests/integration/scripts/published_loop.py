"""A training loop of its own, in the idioms of published scripts; its config is published_config.py beside it."""

import internlm
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.data import build_train_loader_with_data_type
from internlm.initialize import initialize_distributed_env, initialize_trainer
from internlm.model.builder import create_model
from internlm.monitor import initialize_monitor_manager, internevo_monitor
from internlm.train import (
    initialize_checkpoint_manager,
    initialize_model_and_parallel_communicator,
    initialize_optimizer,
)


@internevo_monitor(feishu_alert=True, clean_run=True)
def main():
    parser = internlm.initialize.get_default_parser()
    parser.add_argument("--user_arg", type=int, default=-1)
    args = parser.parse_args()
    initialize_distributed_env(
        config=args.config,
        launcher=args.launcher,
        master_port=args.port,
        seed=args.seed,
        args_check=True,
        overrides=args.set,
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
    trainer, train_dl, _, _ = initialize_trainer(
        model=model,
        optimizer=optimizer,
        criterion=None,
        train_dataloader=train_dl,
        lr_scheduler=lr_scheduler,
        beta2_scheduler=beta2_scheduler,
        scheduler_hooks=[],
    )
    train_state = trainer.state
    ckpt_manager = initialize_checkpoint_manager(model, optimizer, train_dl)
    ckpt_manager.try_resume_training(train_state, "Nov28_19-37-40")
    trainer.train()
    train_iter = iter(train_dl)
    with initialize_monitor_manager(job_name=config.JOB_NAME, alert_address=None):
        for batch_count in range(train_state.batch_count, config.data.total_steps):
            if batch_count == args.user_arg:
                raise RuntimeError("a bug")
            batch = next(train_iter)
            train_state.batch_count = batch_count
            train_state.num_consumed_samples_in_epoch += len(batch[1])
            trainer.zero_grad()
            _, _, loss = trainer.execute_schedule(
                batch, forward_only=False, return_loss=True, return_output_label=False
            )
            success, grad_norm = trainer.step()
            train_state.num_consumed_tokens += batch[1].nelement() * gpc.get_world_size(ParallelMode.DATA)
            if success:
                train_state.step_count += 1
            else:
                train_state.inf_nan_skip_batches += 1
            assert success
            assert grad_norm > 0
            with open(f"losses-{gpc.get_global_rank()}", "a") as file:
                print(loss.item(), lr_scheduler.get_last_lr()[0], optimizer.param_groups[0]["lr"], file=file)
            now_break = ckpt_manager.try_save_checkpoint(train_state)
            if now_break:
                break
    ckpt_manager.wait_async_upload_finish()
    assert (train_state.batch_count, train_state.step_count) == (config.data.total_steps, config.data.total_steps)
    assert train_state.num_consumed_samples_in_epoch == config.data.total_steps * config.data.micro_num
    assert beta2_scheduler.get_beta2() == config.adam.adam_beta2


main()
