"""Model assembly, a recipe in a fixed order: build → initialise → communicators."""

from __future__ import annotations

import torch
from torch import nn

from internlm import accelerator
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.context.random import derived_seed
from internlm.core.parallel import Communicator, ParallelLinear
from internlm.core.parallel.collectives import broadcast
from internlm.core.parallel.communicator import SILENT
from internlm.core.parallel.placement import initialize_parameters, placed_parameters
from internlm.model.registry import model_initializer, register_model_initializer
from internlm.ops import why_unavailable
from internlm.utils.dtype import default_dtype, torch_dtype
from internlm.utils.errors import ConfigError, Problem


def create_model(model_type: str | None = None) -> nn.Module:
    """The model of the global config (or of another registered ``model_type``), its parameters drawn from the run's
    seed."""
    return build_model(gpc.config, gpc.seed, model_type)


def build_model(config: Config, seed: int, model_type: str | None = None) -> nn.Module:
    """The model that ``config`` describes, on this process's device, its parameters drawn from ``seed``."""
    register_model_initializer()
    build = model_initializer.get_module(model_type or config.model_type)
    assert config.model.dtype is not None, "the resolver fills model.dtype"
    dtype = torch_dtype(config.model.dtype)
    _check_attention(config.model.attention_backend, dtype)
    if config.model.dtype == "torch.tf32":
        torch.set_float32_matmul_precision("high")
    device = accelerator.current_device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), default_dtype(dtype), device:
        torch.manual_seed(derived_seed(seed, "model"))  # for models that draw their own values
        model: nn.Module = build(config.model)
    initialize_parameters(model, seed)
    return model


def _check_attention(backend: str, dtype: torch.dtype) -> None:
    reason = "" if backend == "auto" else why_unavailable(backend, accelerator.device_type(), dtype)
    if reason:
        raise ConfigError(Problem("model.attention_backend", f"'{backend}' can't be used: {reason}", "Use 'auto'"))


def initialize_model(model: nn.Module | None = None) -> nn.Module:
    """A model ready for training: ``model`` (default: :func:`create_model`), each of its parameters placed, and equal
    on all ranks that hold copies of it, however it was made."""
    model = create_model() if model is None else model
    for _, parameter, _ in placed_parameters(model):
        broadcast(parameter.detach(), gpc.get_group(ParallelMode.DATA))
    return model


def initialize_parallel_communicator(model: nn.Module) -> Communicator | None:
    """Attach the communicators of the parallel mode to the layers of ``model``; that of isp is returned, if isp is on.

    With data parallelism alone every layer is whole and stays with the silent communicator that it was built with.
    """
    for module in model.modules():
        if isinstance(module, ParallelLinear):
            module.communicator = SILENT
    return None


def initialize_model_and_parallel_communicator(
    model: nn.Module | None = None,
) -> tuple[nn.Module, Communicator | None]:
    """:func:`initialize_model`, then :func:`initialize_parallel_communicator`; both results."""
    model = initialize_model(model)
    return model, initialize_parallel_communicator(model)
