"""Start of a run: command line, process groups and the trainer."""

from internlm.utils.lazy import lazy_exports

_LAUNCH = "internlm.initialize.launch"
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "get_default_parser": "internlm.utils.common",
        "parse_args": "internlm.utils.common",
        "initialize_distributed_env": _LAUNCH,
        "launch_from_torch": _LAUNCH,
        "launch_from_slurm": _LAUNCH,
        "initialize_trainer": "internlm.initialize.build_trainer",
    },
)
