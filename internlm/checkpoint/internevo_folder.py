"""Checkpoints of InternEvo's earlier versions and of InternLM as folders of a decoder's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from internlm.checkpoint.hf_folder import shortened
from internlm.checkpoint.hf_names import INTERNLM_BLOCK
from internlm.checkpoint.internevo_files import CONFIG_NEEDED, InternEvoFiles, Shards, same_bits
from internlm.checkpoint.safetensors_files import DOWNLOAD, quoted
from internlm.checkpoint.sharded_tensors import ShardedTensor
from internlm.checkpoint.tensor_boxes import Segments
from internlm.model.hf_tensors import HFTensor, hf_tensors, tensor_shapes
from internlm.model.spec import DecoderSpec
from internlm.utils.errors import CheckpointError, Problem

#: Names by those of Hugging Face.
_MODULES = {
    "model.embed_tokens": "embedding",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    **INTERNLM_BLOCK,
}


class InternEvoFolder:
    """Tensors of a decoder in the files of a checkpoint, whole.

    Args:
        files: The files.
        spec: The decoder, whose shapes say along which axis a tensor was split.
        is_stacked: Whether a fused projection has all queries, then all keys, then all values.

    Raises:
        CheckpointError: A tensor has not the shape of the decoder's.
    """

    head, todo = "output.weight", CONFIG_NEEDED

    def __init__(self, files: InternEvoFiles, spec: DecoderSpec, is_stacked: bool) -> None:
        self.path = str(files.path)
        self._files, self._spec, self._is_stacked = files, spec, is_stacked
        shapes = tensor_shapes(spec)
        self._expected = {row.name: row.shape(shapes[row.ours]) for row in self.table(spec)}
        self._problems: list[Problem] = []
        # Layers have the same names, so the first decides for all.
        swaps = self._swaps()
        self.tensors: Mapping[str, ShardedTensor] = {}
        for name, shards in files.tensors.items():
            swapped = {"w2": "w3", "w3": "w2"}.get(name.split(".")[-2]) if swaps and ".mlp." in shards.name else None
            own = re.sub(r"w\d(\.\w+)$", rf"{swapped}\1", name) if swapped else name
            for part, tensor in self._parts(own, shards):
                if part in self.tensors:
                    self._problems.append(self._problem(shards, f"is the same tensor as {part}", "Remove one of them"))
                self.tensors[part] = tensor
        if self._problems:
            raise CheckpointError(*shortened(self._problems))

    @staticmethod
    def table(spec: DecoderSpec) -> Iterator[HFTensor]:
        """Yield the tensors that a decoder needs, with fused ones taken apart."""
        for row in hf_tensors(spec):
            match = re.fullmatch(r"(model\.(layers\.\d+\.))?(.+)\.(weight|bias)", row.name)
            assert match is not None, row.name
            yield replace(row, name=f"{match[2] or ''}{_MODULES[match[3]]}.{match[4]}")

    def read_box(self, stored: ShardedTensor, shape: Sequence[int], offsets: Sequence[int], target: Tensor) -> None:
        """Read a box of a tensor, as :class:`~internlm.checkpoint.hf_folder.TensorFolder` says."""
        stored.read_box(shape, offsets, target)

    def close(self) -> None:
        """Do nothing: the files stay mapped as long as the tensors are referred to."""

    def _problem(self, shards: Shards, message: str, todo: str) -> Problem:
        return Problem(f"{self.path}: {quoted(shards.name)}", message, todo)

    def _parts(self, name: str, shards: Shards) -> Iterator[tuple[str, ShardedTensor]]:
        """Yield the tensors of the table that a tensor of the files holds, with their names."""
        outer, fused, parameter = name.rpartition("attention.wqkv.")
        names = [f"{outer}attention.{part}.{parameter}" for part in ("wq", "wk", "wv")]
        if fused and names[0] in self._expected:
            yield from (self._stacked if self._is_stacked else self._grouped)(names, shards)
            return
        expected = self._expected.get(name)
        # A tensor that the decoder has not is reported by the reader.
        whole = ShardedTensor(tuple(shards.tensors[0].shape), shards.tensors[:1])
        yield name, (whole if expected is None else self._whole(shards, expected)) or whole

    def _whole(self, shards: Shards, expected: tuple[int, ...]) -> ShardedTensor | None:
        """Return a tensor of shape ``expected``, or None if its shards do not make up one."""
        first, *others = shards.tensors
        if first.shape == expected:
            # Ranks compute the same updates of what they all hold; files of two saves differ.
            if not all(same_bits(first, other) for other in others):
                self._problems.append(self._problem(shards, "differs between the files of one stage", DOWNLOAD))
            return ShardedTensor(expected, (first,))
        count = len(shards.tensors)
        # Shapes differ along one axis at most, so the shapes alone say how a tensor was split.
        for axis in range(first.dim()):
            sizes = [size * (count if axis == index else 1) for index, size in enumerate(first.shape)]
            if tuple(sizes) == expected and all((x.shape, x.dtype) == (first.shape, first.dtype) for x in others):
                return ShardedTensor(expected, shards.tensors, axis)
        shapes = ", ".join(dict.fromkeys(str(list(tensor.shape)) for tensor in shards.tensors))
        message = f"expected shape {list(expected)}, got {count} {'shard' if count == 1 else 'shards'} of {shapes}"
        self._problems.append(self._problem(shards, message, CONFIG_NEEDED))
        return None

    def _fused(self, names: Sequence[str], shards: Shards) -> ShardedTensor | None:
        expected = [self._expected[name] for name in names]
        whole = self._whole(shards, (sum(shape[0] for shape in expected), *expected[0][1:]))
        if whole is not None and (whole.axis or any(shape[0] % len(whole.shards) for shape in expected)):
            message = f"cannot be split over {len(whole.shards)} ranks with their heads"
            self._problems.append(self._problem(shards, message, CONFIG_NEEDED))
            return None
        return whole

    def _stacked(self, names: Sequence[str], shards: Shards) -> Iterator[tuple[str, ShardedTensor]]:
        """Yield tensors that are stored one below the other, by each rank of tensor parallelism for itself."""
        whole = self._fused(names, shards)
        if whole is None:
            return
        count, start = len(whole.shards), 0
        for name in names:
            shape = self._expected[name]
            # Under isp ranks hold parts of the whole stack, which may end between two heads, or two of the tensors.
            if self._files.is_isp:
                size = math.prod(shape)
                yield name, ShardedTensor(shape, whole.shards, 0, Segments(start, size, size))
            else:
                size = shape[0] // count
                yield name, ShardedTensor(shape, tuple(shard[start : start + size] for shard in whole.shards))
            start += size

    def _grouped(self, names: Sequence[str], shards: Shards) -> Iterator[tuple[str, ShardedTensor]]:
        """Yield queries, keys and values that are stored by kv head."""
        whole = self._fused(names, shards)
        if whole is None:
            return
        c, start = self._spec.config, 0
        of_head = c.head_size * math.prod(whole.shape[1:])
        queries = c.num_attention_heads // c.kv_heads
        for name, heads in zip(names, (queries, 1, 1), strict=True):
            segments = Segments(start, heads * of_head, (queries + 2) * of_head)
            yield name, ShardedTensor(self._expected[name], whole.shards, 0, segments)
            start += heads * of_head

    def _swaps(self) -> bool:
        """Return whether w3 is the down projection, as in the first generation, and not w2."""
        found = self._files.tensors.get("layers.0.feed_forward.w3.weight")
        if found is None or ".mlp." not in found.name:
            return False
        up, down = (self._expected[f"layers.0.feed_forward.{name}.weight"] for name in ("w3", "w2"))
        count, shape = len(found.tensors), tuple(found.tensors[0].shape)

        def may_be(whole: tuple[int, ...], axis: int) -> bool:
            sizes = list(whole)
            sizes[0 if self._files.is_isp else axis] //= count
            return tuple(sizes) == shape

        # The same shape fits both where ranks have as many features as there are hidden units.
        return may_be(down, 1) and (not may_be(up, 0) or "blocks." in found.name)
