"""Train a model.

``torchrun --nproc_per_node=2 train.py --config configs/demo.py``, or ``srun python train.py …`` under Slurm.
"""

from internlm.core.context import global_context as gpc
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type, build_valid_loader_with_data_type
from internlm.initialize import initialize_distributed_env
from internlm.model.builder import create_model
from internlm.utils.common import parse_args
from internlm.utils.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Build the model, the data loaders and the trainer from the command line, and train."""
    args = parse_args()
    initialize_distributed_env(
        config=args.config,
        launcher=args.launcher,
        master_port=args.port,
        seed=args.seed,
        host=args.host,
        backend=args.backend,
        overrides=args.set,
        rank=args.rank,
        world_size=args.world_size,
        local_rank=args.local_rank,
    )
    model = create_model(model_type=gpc.config.model_type, deferred=True)
    train_dl, dataset_types = build_train_loader_with_data_type()
    val_dls = build_valid_loader_with_data_type()
    TrainerBuilder(model, train_dl, val_dls, dataset_types=dataset_types, **vars(args)).fit()


if __name__ == "__main__":
    main()
