"""Initial values of parameters: functions of seed, logical name and logical index, so a rank draws only its shard.

The generator is counter-based: any element can be drawn without the elements before it (as in Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"):

1. SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): the i-th output of a
   generator with state ``key`` is a mix of the bits of key + (i + 1)·γ, with γ = 2⁶⁴ / golden ratio. The key is a hash
   of seed and name, i the index of the element in the flattened logical tensor.
2. Box and Muller (1958): the upper 31 bits give a number u and a radius r = √(−2·ln u), the lower 32 bits an angle θ;
   r·sin θ is standard normal.

All float operations are correctly rounded by IEEE 754 (+, −, ×, ÷, √), and each is a separate NumPy call, so that no
two are fused into one instruction. Hence a value depends neither on the processor's SIMD width nor on which elements
are drawn together. The logarithms and sines of vector libraries do not guarantee this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from internlm.accelerator import kind_of
from internlm.core.context.random import derived_seed
from internlm.core.parallel.fully_sharded import adopt_new_shards, local_shard
from internlm.core.parallel.param_state import compute_dtype, placed_parameters, placement_of
from internlm.core.parallel.placement import TensorSlice
from internlm.utils.errors import Problem, UserError

UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

#: Number of elements drawn at once, so that the arrays of a chunk stay in a core's L2 cache.
CHUNK = 8192
_GAMMA = 0x9E3779B97F4A7C15  # 2⁶⁴ divided by the golden ratio
_MASK = 2**64 - 1


# -- parameters -------------------------------------------------------------------------------------------------------
def materialize(
    model: nn.Module, seed: int, device: torch.device, draws: Callable[[str], bool] = lambda name: True
) -> list[nn.Parameter]:
    """Allocate all meta parameters of ``model`` on ``device``, draw their initial values, and return them.

    Parameters keep their identity, so tied weights stay tied, and placements and communicators stay valid.

    Args:
        model: Model with parameters on the meta device.
        seed: Seed of the run.
        device: Device to allocate on.
        draws: Whether to draw the values of the parameter with a logical name. Others have undefined values, so the
            caller must load all of them; only padding, which no checkpoint has, is zero.

    Raises:
        UserError: The placement of a parameter on the meta device specifies no initial values.
    """
    deferred = [(name, parameter) for name, parameter, _ in placed_parameters(model) if parameter.is_meta]
    for name, parameter in deferred:
        if placement_of(parameter).init is None:
            message = "is on the meta device and has no initial values"
            todo = f"Build its module on device {str(device)!r}"
            raise UserError(Problem(f"model parameter '{name}'", message, todo))
        new = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        new.__dict__.update(parameter.__dict__)
        torch.utils.swap_tensors(parameter, new)
    if deferred:
        adopt_new_shards(model)  # before values are written: fully_shard may move a shard to pad it
    for name, parameter in deferred:
        if draws(name):
            draw(parameter, name, seed)
        else:
            _clear_padding(parameter, name)
    return [parameter for _, parameter in deferred]


def initialize_parameters(module: nn.Module, seed: int) -> None:
    """Draw the initial values of every parameter of ``module`` whose placement specifies them."""
    for name, parameter, _ in placed_parameters(module):
        draw(parameter, name, seed)


@torch.no_grad()
def draw(parameter: nn.Parameter, name: str, seed: int) -> None:
    """Draw the initial values of this rank's shard of ``parameter`` in place; set padding to zero.

    Values are drawn in float32, at most :data:`CHUNK` at a time, and rounded to the compute dtype of the parameter.

    Args:
        parameter: Parameter with a placement. It is unchanged if the placement specifies no initial values, or in a dry
            run.
        name: Logical name, the same in every layout.
        seed: Seed of the run.
    """
    placement = placement_of(parameter, name)
    if placement.init is None or not kind_of(parameter.device).has_values:
        return
    flat, start = local_shard(parameter)
    fused, shape = placement.init.fused, placement.global_shape
    if fused is not None:
        name, shape = fused.name_of(name), fused.shape_of(shape)
    key = derived_seed(seed, "parameter", name)
    end = 0  # end of the elements that are not padding
    for tensor_slice in placement.slices(start, start + flat.numel()):
        end = tensor_slice.stop - start
        if placement.init.std == 0.0:
            flat[tensor_slice.start - start : end].fill_(placement.init.mean)
            continue
        offset = tensor_slice.start - start
        drawn = tensor_slice if fused is None else fused.slice_of(tensor_slice)
        for values in normal_chunks(key, shape, drawn, placement.init.mean, placement.init.std):
            rounded = torch.from_numpy(values).to(compute_dtype(parameter))
            flat[offset : offset + len(values)].copy_(rounded)
            offset += len(values)
    flat[end:].zero_()


@torch.no_grad()
def _clear_padding(parameter: nn.Parameter, name: str) -> None:
    """Set the padding at the end of this rank's shard of ``parameter`` to zero."""
    flat, start = local_shard(parameter)
    slices = placement_of(parameter, name).slices(start, start + len(flat))
    flat[max((held.stop - start for held in slices), default=0) :].zero_()


# -- draws ------------------------------------------------------------------------------------------------------------
def normal_chunks(
    key: int, shape: tuple[int, ...], tensor_slice: TensorSlice, mean: float = 0.0, std: float = 1.0
) -> Iterator[Float32]:
    """Draw normally distributed values for a slice of a tensor, in row-major order and chunk by chunk.

    Args:
        key: 64-bit key of the tensor.
        shape: Shape of the logical tensor.
        tensor_slice: Slice of the logical tensor to draw.
        mean: Mean of the distribution.
        std: Standard deviation of the distribution.

    Yields:
        Values of a chunk, at most :data:`CHUNK`, in a buffer that the next chunk overwrites.
    """
    counters, values, scratch = np.empty(CHUNK, np.uint64), np.empty(CHUNK, np.float32), _Scratch()
    for size in _counters(key, shape, tensor_slice, counters):
        drawn = values[:size]
        _standard_normal(counters[:size], drawn, scratch)
        drawn *= np.float32(std)
        if mean:
            drawn += np.float32(mean)
        yield drawn


def _counters(key: int, shape: tuple[int, ...], tensor_slice: TensorSlice, out: UInt64) -> Iterator[int]:
    """For each chunk, write the counters of its elements to ``out`` and yield their number.

    The counter of element i is key + (i + 1)·γ, with γ = ``_GAMMA``. The slice consists of contiguous segments, each of
    which spans the trailing axes that the slice covers fully, and the axis before them. A chunk is part of one segment,
    or several whole segments.
    """
    axis, length = len(shape), 1
    while axis > 0:
        axis -= 1
        length *= tensor_slice.sizes[axis]
        if tensor_slice.sizes[axis] != shape[axis]:
            break
    strides = [math.prod(shape[later + 1 :]) for later in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(tensor_slice.offsets, strides, strict=True))
    ramp = np.arange(min(length, CHUNK), dtype=np.uint64) * np.uint64(_GAMMA)
    segments = math.prod(tensor_slice.sizes[:axis])
    at_once = max(1, CHUNK // length)  # segments per chunk
    for index in range(0, segments, at_once):
        begins = np.zeros(min(at_once, segments - index), np.uint64)
        positions = np.unravel_index(np.arange(index, index + len(begins)), tensor_slice.sizes[:axis]) if axis else ()
        for position, stride in zip(positions, strides, strict=False):
            begins += position.astype(np.uint64) * np.uint64(stride * _GAMMA & _MASK)
        for column in range(0, length, CHUNK):
            size = min(CHUNK, length - column)
            begin = np.uint64((key + (first + column + 1) * _GAMMA) & _MASK)
            np.add((begins + begin)[:, None], ramp[:size], out=out[: len(begins) * size].reshape(len(begins), size))
            yield len(begins) * size


class _Scratch:
    """Temporary arrays of :data:`CHUNK` elements, reused for every chunk."""

    def __init__(self) -> None:
        self.words = np.empty(CHUNK, np.uint64)
        self.exponent, self.integer = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int32)
        self.radius, self.angle, self.square = (np.empty(CHUNK, np.float32) for _ in range(3))


#: Coefficients of 2 · atanh(s) / s in s², for the logarithm; s² ≤ 0.0295, so the next term is below 2⁻²⁵.
_LOG = tuple(np.float32(2 / n) for n in (9, 7, 5, 3, 1))
#: Coefficients of sin(θ) / θ in θ²; |θ| ≤ π/2, so the next term is below 2⁻²⁴.
_SIN = tuple(np.float32((-1) ** n / math.factorial(2 * n + 1)) for n in (5, 4, 3, 2, 1, 0))


def _standard_normal(z: UInt64, out: Float32, scratch: _Scratch) -> None:
    """Compute standard normal values from the counters ``z`` into ``out``; ``z`` is overwritten."""
    size = len(z)
    words, exponent, integer = scratch.words[:size], scratch.exponent[:size], scratch.integer[:size]
    radius, angle, square = scratch.radius[:size], scratch.angle[:size], scratch.square[:size]

    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(z, np.uint64(shift), out=words)
        np.bitwise_xor(z, words, out=z)
        if factor is not None:
            np.multiply(z, np.uint64(factor), out=z)

    # u in [2⁻³¹, 1] as m · 2^e with m in [√½, √2): then ln u = 2·atanh((m − 1)/(m + 1)) + e·ln 2, whose relative error
    # is small near u = 1 too, where e = 0.
    np.right_shift(z, np.uint64(33), out=words)
    np.copyto(integer, words, casting="unsafe")
    np.bitwise_or(integer, 1, out=integer)
    np.multiply(integer, np.float32(2**-31), out=radius, dtype=np.float32, casting="unsafe")
    bits = radius.view(np.int32)
    np.subtract(bits, np.int32(0x3F3504F3), out=exponent)  # the bits of √½
    np.right_shift(exponent, 23, out=exponent)
    np.left_shift(exponent, 23, out=integer)
    np.subtract(bits, integer, out=bits)
    np.add(radius, np.float32(1), out=angle)
    np.subtract(radius, np.float32(1), out=radius)
    np.divide(radius, angle, out=radius)
    np.multiply(radius, radius, out=square)
    _horner(_LOG, square, out)
    np.multiply(radius, out, out=radius)
    np.multiply(exponent, np.float32(math.log(2)), out=out, dtype=np.float32, casting="unsafe")
    np.add(radius, out, out=radius)
    np.multiply(radius, np.float32(-2), out=radius)
    np.sqrt(radius, out=radius)

    np.copyto(integer, z, casting="unsafe")  # the lower 32 bits as a signed integer
    np.multiply(integer, np.float32(math.pi * 2**-32), out=angle, dtype=np.float32, casting="unsafe")
    np.multiply(angle, angle, out=square)
    _horner(_SIN, square, out)
    np.multiply(out, angle, out=out)
    np.multiply(out, radius, out=out)


def _horner(coefficients: tuple[np.float32, ...], x: Float32, out: Float32) -> None:
    """Evaluate the polynomial in ``x`` whose ``coefficients`` are given from the highest power down."""
    out.fill(coefficients[0])
    for coefficient in coefficients[1:]:
        np.multiply(out, x, out=out)
        np.add(out, coefficient, out=out)
