"""Random streams of a rank, with the same seed on ranks that must draw the same numbers and different seeds on others.

There are two streams, named by a :class:`ParallelMode`. ``DATA``: the ranks of a tensor group, which hold the same
activations, draw the same numbers; ranks with other samples or layers draw different ones. ``TENSOR``: all ranks draw
different numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from internlm.accelerator import device_rng_state, set_device_rng_state
from internlm.core.context.layout import ParallelMode


def derived_seed(seed: int, *labels: object) -> int:
    """Derive a 63-bit seed from ``seed`` and ``labels``, the same on every machine and Python version."""
    # Python's own hash() of strings differs between processes.
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def mode_seeds(seed: int, data_rank: int, pipeline_rank: int, tensor_rank: int) -> dict[ParallelMode, int]:
    """Return the seed of each random stream, derived from the run's ``seed`` and this rank's position in the layout."""
    return {
        ParallelMode.DATA: derived_seed(seed, "data", data_rank, pipeline_rank),
        ParallelMode.TENSOR: derived_seed(seed, "tensor", data_rank, pipeline_rank, tensor_rank),
    }


class RandomStreams:
    """Random streams of this rank, one per mode, which share torch's default CPU generator.

    Outside of :meth:`use`, the ``DATA`` stream is active. The CUDA generator has only the ``DATA`` stream.

    Args:
        seeds: Seed of each stream.
        owners: Position in the layout of the ranks that share each stream, for checkpoints.
    """

    def __init__(self, seeds: Mapping[ParallelMode, int], owners: Mapping[ParallelMode, str] | None = None) -> None:
        self._owners = owners or dict.fromkeys(seeds, "0")
        self._states = {mode: torch.Generator().manual_seed(seed).get_state() for mode, seed in seeds.items()}
        self._current = ParallelMode.DATA
        torch.manual_seed(seeds[ParallelMode.DATA])

    @contextmanager
    def use(self, mode: ParallelMode) -> Iterator[None]:
        """Draw from the stream of ``mode`` on the default CPU generator within the ``with`` block."""
        outer = self._current
        self._switch(mode)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, mode: ParallelMode) -> None:
        self._states[self._current] = torch.get_rng_state()
        torch.set_rng_state(self._states[mode])
        self._current = mode

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the generator state of each stream, and of the device if it has one."""
        self._states[self._current] = torch.get_rng_state()
        states = {mode.value: state.clone() for mode, state in self._states.items()}
        return states | device_rng_state()

    @property
    def owners(self) -> dict[str, str]:
        """Position in the layout of the ranks that share each entry of :meth:`state_dict`."""
        names = [mode.value for mode in self._states]
        by_name = {mode.value: owner for mode, owner in self._owners.items()}
        return {name: by_name[name] for name in names} | dict.fromkeys(
            device_rng_state(), self._owners[ParallelMode.DATA]
        )

    def load_state_dict(self, states: Mapping[str, torch.Tensor]) -> None:
        """Restore the streams in ``states``, a result of :meth:`state_dict`; streams that are not in it go on."""
        self._states[self._current] = torch.get_rng_state()
        for mode in self._states:
            if mode.value in states:
                self._states[mode] = states[mode.value].clone()
        torch.set_rng_state(self._states[self._current])
        set_device_rng_state(states)
