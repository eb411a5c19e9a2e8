"""Reader of a decoder's tensors from a folder, box by box: a rank reads only the slices that it holds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from internlm.checkpoint.hf_folder import TensorFolder, shortened
from internlm.checkpoint.logical_tensors import PIECE_BYTES, LogicalTensors, Offsets, cut
from internlm.checkpoint.safetensors_files import DOWNLOAD, DTYPES, quoted
from internlm.model.hf_tensors import HFTensor, tensor_shapes
from internlm.model.spec import DecoderSpec
from internlm.utils.errors import CheckpointError, Problem

#: Tensors that old folders hold although they follow from the config.
_COMPUTED = re.compile(r"model(\.layers\.\d+\.(self_attn|attention))?\.rotary_emb\.inv_freq|rope\.freqs")


class HFReader:
    """Tensors of a decoder in a folder of other software. Use it as a context manager, which closes the files.

    Args:
        folder: The folder.
        spec: The decoder that its tensors are read for.
    """

    def __init__(self, folder: TensorFolder, spec: DecoderSpec) -> None:
        self.folder = folder
        self.is_tied = spec.config.tie_word_embeddings
        self.rows: dict[str, list[HFTensor]] = {}
        """Tensors of the folder that make up each tensor of the decoder."""
        for row in folder.table(spec):
            self.rows.setdefault(row.ours, []).append(row)
        self.shapes = tensor_shapes(spec)
        """Shape of each tensor of the decoder."""

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.folder.close()

    def check(self) -> None:
        """Check that the folder has the decoder's tensors, with their shapes and floating-point dtypes, and no others.

        Raises:
            CheckpointError: It does not.
        """
        if problems := [*self._problems(), *self._unused()]:
            raise CheckpointError(*shortened(problems))

    def _problems(self) -> Iterator[Problem]:
        for row in (row for rows in self.rows.values() for row in rows):
            stored, where = self.folder.tensors.get(row.name), f"{self.folder.path}: {row.name}"
            if stored is None:
                yield Problem(where, "is missing", self.folder.todo)
            elif stored.dtype not in DTYPES:
                yield Problem(where, f"expected dtype {', '.join(DTYPES)}, got {stored.dtype}", DOWNLOAD)
            elif stored.shape != (expected := row.shape(self.shapes[row.ours])):
                yield Problem(where, f"expected shape {list(expected)}, got {list(stored.shape)}", self.folder.todo)

    def _unused(self) -> Iterator[Problem]:
        known = {row.name for rows in self.rows.values() for row in rows}
        for name in self.folder.tensors:
            if name in known or _COMPUTED.fullmatch(name):
                continue
            where = f"{self.folder.path}: {quoted(name)}"
            # Some tools save a tied head too. If it is another tensor, the folder says two things.
            embedding = self.rows["embedding.weight"][0].name
            if name == self.folder.head and self.is_tied:
                if self._differ(name, embedding):
                    message = f"differs from {embedding}, although tie_word_embeddings is true"
                    yield Problem(where, message, "Set it to false in config.json and in the model section")
                continue
            yield Problem(where, "the model has no such tensor", self.folder.todo)

    def _differ(self, name: str, embedding: str) -> bool:
        one, other = (self.folder.tensors.get(key) for key in (name, embedding))
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            return True
        whole = torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta")
        for offsets, part in cut((0,) * len(one.shape), whole, PIECE_BYTES // whole.itemsize):
            boxes = [torch.empty(part.shape, dtype=part.dtype) for _ in range(2)]
            for stored, box in zip((one, other), boxes, strict=True):
                self.folder.read_box(stored, one.shape, offsets, box)
            if not torch.equal(*(box.view(torch.uint8) for box in boxes)):
                return True
        return False

    def dtype(self, name: str) -> torch.dtype:
        """Return the narrowest dtype that holds the values of all tensors that make up the decoder's ``name``."""
        # Norms may be stored with more precision than matrices, and nothing of it is lost.
        first, *others = (DTYPES[self.folder.tensors[row.name].dtype] for row in self.rows[name])
        for other in others:
            first = torch.promote_types(first, other)
        return first

    @property
    def main_dtype(self) -> torch.dtype:
        """Dtype of the largest tensor: norms may be stored with more precision."""
        return self.dtype(max(self.rows, key=lambda name: math.prod(self.shapes[name])))

    def read(self, tensors: LogicalTensors) -> None:
        """Read into the slices of ``tensors``, whose names begin with ``model/``.

        Raises:
            CheckpointError: A file cannot be read.
        """
        with torch.no_grad():
            for name, tensor in tensors.items():
                for offsets, target in tensor.slices.items():
                    # Small enough that memory is bounded, large enough that reading dominates.
                    for at, part in cut(offsets, target, PIECE_BYTES // tensor.dtype.itemsize):
                        self.read_slice(name.removeprefix("model/"), at, part)

    def read_slice(self, name: str, offsets: Offsets, target: Tensor) -> None:
        """Read the slice of the decoder's tensor ``name`` that begins at ``offsets`` into ``target``.

        Args:
            name: Name of the tensor in the decoder.
            offsets: Offsets of the slice.
            target: Memory to read into, of the slice's shape and any floating-point dtype.
        """
        for row in self.rows[name]:
            own_offsets, own = list(offsets), target
            if row.part is not None:
                axis, start, length = row.part
                first = max(offsets[axis], start)
                last = min(offsets[axis] + target.shape[axis], start + length)
                if first >= last:
                    continue
                own = target.narrow(axis, first - offsets[axis], last - first)
                own_offsets[axis] = first - start
            self._read_part(row, row.part_shape(self.shapes[name]), own_offsets, own)

    def _read_part(self, row: HFTensor, shape: Sequence[int], offsets: Sequence[int], target: Tensor) -> None:
        stored = self.folder.tensors[row.name]
        if not row.reorders:
            self.folder.read_box(stored, shape, offsets, target)
            return
        # Whole heads are read, in the order of theirs, and what is needed of them is taken.
        axis = row.head_axis(len(shape))
        halves = row.split_of_head(shape[axis])
        split = [*shape[:axis], *halves, *shape[axis + 1 :]]
        sizes = [*target.shape[:axis], *halves, *target.shape[axis + 1 :]]
        box = torch.empty(sizes, dtype=DTYPES[stored.dtype])
        self.folder.read_box(stored, split, [*offsets[:axis], 0, 0, *offsets[axis + 1 :]], box)
        heads = box.transpose(axis, axis + 1).flatten(axis, axis + 1)
        target.copy_(heads.narrow(axis, offsets[axis], target.shape[axis]))
