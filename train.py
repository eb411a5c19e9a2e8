"""Train a model, on one rank of ``torchrun --nproc_per_node=2 train.py --config configs/demo.py``.

Under Slurm: ``srun python train.py …``. The command ``internlm train`` starts the ranks itself. A script of your own
calls the functions of ``internlm/cli/rank.py``.
"""

from internlm.cli.training import main

if __name__ == "__main__":
    main()
