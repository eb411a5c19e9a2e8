"""A script as users write it: a model of their own, arguments of their own, a hook of their own."""

import os
import signal
import time

from torch import nn

from internlm.core.context import global_context as gpc
from internlm.core.parallel import place_replicated
from internlm.core.trainer import Hook
from internlm.core.trainer_builder import TrainerBuilder
from internlm.data import build_train_loader_with_data_type, build_valid_loader_with_data_type
from internlm.initialize import get_default_parser, initialize_distributed_env
from internlm.model.builder import create_model
from internlm.utils.errors import exit_on_user_error
from internlm.utils.registry import MODEL_INITIALIZER


class NextToken(nn.Module):
    """Guesses the next token from the last one."""

    def __init__(self, vocab_size, hidden_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, vocab_size))

    def forward(self, input_ids, cu_seqlens=None, indexes=None):
        return self.layers(self.embedding(input_ids))


@MODEL_INITIALIZER.register_module(module_name="NEXT_TOKEN")
def build_next_token(model):
    return place_replicated(NextToken(model.vocab_size, model.hidden_size))


class SendSignal(Hook):
    """Asks one rank to stop, or its launcher and then the rank, once a job."""

    def __init__(self, rank, step, number, launcher):
        self.rank, self.step, self.number = rank, step, number
        self.receivers = [os.getppid(), os.getpid()] if launcher else [os.getpid()]

    def before_step(self, trainer):
        started_anew = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if (gpc.get_global_rank(), trainer.state.step) == (self.rank, self.step) and not started_anew:
            for receiver in self.receivers:
                os.kill(receiver, self.number)
                time.sleep(0.5 if receiver != os.getpid() else 0)  # the launcher signals its ranks meanwhile


@exit_on_user_error
def main():
    parser = get_default_parser()
    parser.add_argument("--signal_step", type=int, default=-1, help="step in which rank 1 gets a signal")
    parser.add_argument("--send", type=int, default=signal.SIGTERM, help="which one")
    parser.add_argument("--send_to_launcher", action="store_true", help="whether the launcher gets one before")
    args = parser.parse_args()
    initialize_distributed_env(
        config=args.config, launcher=args.launcher, master_port=args.port, seed=args.seed, overrides=args.set
    )
    model = create_model(model_type="NEXT_TOKEN")
    train_dl, dataset_types = build_train_loader_with_data_type()
    val_dls = build_valid_loader_with_data_type()
    TrainerBuilder(
        model,
        train_dl,
        val_dls,
        config=args.config,
        profiling=args.profiling,
        dataset_types=dataset_types,
        extra_hooks=[SendSignal(1, args.signal_step, args.send, args.send_to_launcher)],
    ).fit()


if __name__ == "__main__":
    main()
