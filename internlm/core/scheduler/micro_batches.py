"""Micro-batches of a step, and checks of a batch that a script makes itself.

Shapes: M micro-batches, T tokens of a packed row, B sequences of S tokens in a padded micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from internlm.accelerator import device_kind, is_host, to_device, with_values
from internlm.utils.errors import Problem, UserError

MODEL_INPUTS = ("input_ids", "cu_seqlens", "indexes")


class MicroBatches:
    """Micro-batches of a step, each copied to the device on access.

    Args:
        batch: Inputs of all micro-batches, on the host.
        labels: Labels of all micro-batches, on the host.
        device: Device of the model.
        host_inputs: Names of the inputs that the model reads on the host.
        types: Number of dataset types; with 1, all tokens are of one type, whatever their ``type_ids`` are.
        vocab_size: Vocabulary size of a decoder, whose batches are checked. None: a user's own model.

    Raises:
        UserError: The batch has no ``input_ids`` or no labels, a dataset type is not below ``types``, or shapes, types
            or values of the batch are not those that a decoder takes.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        labels: Tensor,
        device: torch.device,
        host_inputs: Collection[str] = (),
        types: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        if "input_ids" not in batch or not isinstance(labels, Tensor):
            got = f"({{{', '.join(batch)}}}, {type(labels).__name__})"
            todo = "Pass what a loader yields; without labels of your own, set all of them to -100"
            raise UserError(Problem("batch", f"expected ({{input_ids, …}}, labels as a tensor), got {got}", todo))
        if vocab_size is not None:
            check_shapes(batch, labels)
            if device_kind().has_values:
                check_values(batch, labels, vocab_size)
        self._batch, self._labels, self._device, self._host_inputs = batch, labels, device, host_inputs
        self._type_ids = batch["type_ids"] if types > 1 and "type_ids" in batch else None
        if self._type_ids is not None:
            check_types(self._type_ids, labels, types)

    def __len__(self) -> int:
        return len(self._labels)

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Return the inputs of the model for micro-batch ``index``, by name, each on the side that the model reads."""
        return {
            key: tensor if key in self._host_inputs else self._on_device(tensor)
            for key, tensor in self.host_inputs(index).items()
        }

    def host_inputs(self, index: int) -> dict[str, Tensor]:
        """Return the inputs of the model for micro-batch ``index``, by name, on the host."""
        return {key: self._batch[key][index] for key in MODEL_INPUTS if self._batch.get(key) is not None}

    def labels(self, index: int) -> Tensor:
        """Return the labels of micro-batch ``index``, shaped like its ``input_ids``."""
        return self._on_device(self._labels[index])

    def type_ids(self, index: int) -> Tensor:
        """Return the dataset type of each token of micro-batch ``index``, shaped like its labels."""
        if self._type_ids is None:
            return torch.zeros(self._labels[index].shape, dtype=torch.int64, device=self._device)
        return self._on_device(self._type_ids[index])

    def valid_tokens(self) -> Tensor:
        """Return the number of labels other than −100 in each micro-batch, [micro-batches], on the device."""
        with with_values():  # the labels are on the host
            count = (self._labels != -100).flatten(1).sum(1)
        return self._on_device(count)

    def _on_device(self, tensor: Tensor) -> Tensor:
        # The copy overlaps with the compute of the previous micro-batch.
        return to_device(tensor, self._device)


# -- checks -----------------------------------------------------------------------------------------------------------
LIKE_A_LOADER = "Make batches like those of the training loader"
INTEGERS = (torch.int64, torch.int32)


def check_shapes(batch: Mapping[str, Any], labels: Tensor) -> None:
    """Check that shapes and types of a batch are those that a decoder takes.

    Raises:
        UserError: ``input_ids`` are not integers [M, T] with M ``cu_seqlens``, or [M, B, S] without, or labels or
            positions are not integers of the same shape.
    """
    ids, boundaries = _integers("input_ids", batch["input_ids"]), batch.get("cu_seqlens")
    shape = list(ids.shape)
    if ids.dim() != (3 if boundaries is None else 2) or not ids.numel():
        expected = "[micro_num, micro_bsz, seq_len], or [micro_num, tokens] with cu_seqlens"
        raise _refused("input_ids", f"expected {expected}, got {shape}{'' if boundaries is None else ' with them'}")
    like_ids = {"labels": _integers("labels", labels, INTEGERS[:1])}
    if batch.get("indexes") is not None:
        like_ids["indexes"] = _integers("indexes", batch["indexes"])
    for name, tensor in like_ids.items():
        if len(tensor) != len(ids) or tensor.numel() != ids.numel():
            raise _refused(name, f"expected {shape}, as the input_ids have, got {list(tensor.shape)}")
    if boundaries is not None and (len(boundaries) != len(ids) or not all(isinstance(b, Tensor) for b in boundaries)):
        got = f"{len(boundaries)} of type {type(boundaries[0]).__name__}" if len(boundaries) else "none"
        raise _refused("cu_seqlens", f"expected a tensor for each of the {len(ids)} micro-batches, got {got}")


def check_values(batch: Mapping[str, Any], labels: Tensor, vocab_size: int) -> None:
    """Check the values of a batch in host memory.

    Raises:
        UserError: An input or a label is not in the vocabulary, or ``cu_seqlens`` do not divide their row.
    """
    for name, tensor in (("input_ids", batch["input_ids"]), ("labels", labels)):
        if not is_host(tensor):
            continue
        smallest, largest = (int(value) for value in tensor.aminmax())
        # A second pass only where a label is negative: is each of these -100?
        ignores = tensor is labels and smallest == -100 and not ((tensor < 0) & (tensor != -100)).any()
        if largest >= vocab_size or (smallest < 0 and not ignores):
            message = f"have values from {smallest} to {largest}, but model.vocab_size is {vocab_size}"
            if tensor is labels and smallest == -100 and largest < vocab_size:
                message = "have negative values other than -100"
            todo = "Use the tokenizer of the model, and -100 for labels to ignore"
            raise UserError(Problem(f"{name} of the batch", message, todo))
    for cu_seqlens in () if batch.get("cu_seqlens") is None else batch["cu_seqlens"]:
        if is_host(cu_seqlens):
            _check_boundaries(cu_seqlens, batch["input_ids"][0].numel())


def check_types(value: object, labels: Tensor, types: int) -> None:
    """Check the dataset types of a batch; the tokens of a missing type would be left out of the loss that is logged.

    Raises:
        UserError: ``type_ids`` are not integers shaped like the labels, or not in 0, …, ``types`` - 1.
    """
    type_ids = _integers("type_ids", value)
    if type_ids.numel() != labels.numel():
        raise _refused("type_ids", f"expected {list(labels.shape)}, as the labels have, got {list(type_ids.shape)}")
    if not device_kind().has_values:
        return
    smallest, largest = (int(value) for value in type_ids.aminmax())
    if smallest < 0 or largest >= types:
        wrong = smallest if smallest < 0 else largest
        message = f"contain type {wrong}, but the trainer was built for {types} dataset types"
        todo = f"Pass types={largest + 1} to initialize_trainer, the number of types in the data"
        raise UserError(Problem("type_ids of the batch", message, LIKE_A_LOADER if smallest < 0 else todo))


def _integers(name: str, value: object, dtypes: Collection[torch.dtype] = INTEGERS) -> Tensor:
    """Return ``value``, the part ``name`` of a batch, if it is a tensor of one of ``dtypes``; raise otherwise."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise _refused(name, f"expected a tensor of {' or '.join(map(str, dtypes))}, got {got}")
    return value


def _check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Check the sequence boundaries of a packed row."""
    _integers("cu_seqlens", cu_seqlens)
    ends = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    # Under isp a rank has a shard of the row, but the boundaries of the whole row.
    if len(ends) < 2 or ends[0] != 0 or ends[-1] < tokens or ends[-1] % tokens or ends != sorted(ends):
        raise _refused("cu_seqlens", f"expected 0, …, {tokens} in ascending order, got {_shortened(cu_seqlens)}")


def _shortened(tensor: Tensor) -> str:
    values = [str(value) for value in tensor.flatten().tolist()]
    listed = values if len(values) <= 8 else [*values[:4], "…", *values[-3:]]
    return f"{', '.join(listed) or 'none'}{f' of shape {list(tensor.shape)}' if tensor.dim() != 1 else ''}"


def _refused(name: str, message: str) -> UserError:
    return UserError(Problem(f"{name} of the batch", message, LIKE_A_LOADER))
