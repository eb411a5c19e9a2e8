"""Decorator of a script's main function: alerts of its failure, errors in one line, and a clean end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch.distributed as dist

from internlm.checkpoint.saver import finish_saves
from internlm.config.schema import AlertConfig
from internlm.core.context import global_context as gpc
from internlm.monitor.alerts import alerting_failures
from internlm.utils.errors import exit_on_user_error, report_uncaught_user_errors

F = TypeVar("F", bound=Callable[..., Any])


def internevo_monitor(feishu_alert: bool = True, clean_run: bool = True) -> Callable[[F], F]:
    """Return a decorator for the main function of a training script.

    Alerts go to the destinations in ``monitor.alert`` of the config. None is sent if the function fails before
    ``initialize_distributed_env`` has read the config.

    Args:
        feishu_alert: Whether to send an alert if the function raises an exception.
        clean_run: Whether to end the process cleanly: after an error that the user can fix, print it in one line and
            exit with code 2; after success, destroy the process groups. Errors outside of the function are printed in
            one line too, since published scripts call ``initialize_distributed_env`` before it.
    """

    def decorate(main: F) -> F:
        @functools.wraps(main)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with alerting_failures(_destinations) if feishu_alert else nullcontext():
                result = main(*args, **kwargs)
                if clean_run:
                    finish_saves()  # a script need not wait for its last one
            if clean_run and dist.is_initialized():
                dist.destroy_process_group()
                gpc.destroy()
            return result

        if not clean_run:
            return wrapper  # type: ignore[return-value]
        report_uncaught_user_errors()
        return exit_on_user_error(wrapper)  # type: ignore[return-value]

    return decorate


def _destinations() -> tuple[str, AlertConfig] | None:
    """Return the job name and the alert destinations of the config, or None if no config has been read."""
    return (gpc.config.JOB_NAME, gpc.config.monitor.alert) if gpc.initialized else None
