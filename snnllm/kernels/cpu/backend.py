"""Native CPU backend: encoding, integer matmul and scaling in one C call a linear (`kernels.c`).

Weights of up to 4 bits are packed two to a byte. A prepared layer is described by one int64 tensor,
the C struct `Layer` word by word, which is all a call has to pass besides the input and the output.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from neurons.encoder import Encoding
from snnllm.kernels.cpu import compiler
from snnllm.kernels.cpu.layout import (
    BYTE,
    NIBBLE,
    WIDE,
    choose_layout,
    int16_pair,
    pack_levels,
    padded_starts,
    segment_words,
)
from snnllm.kernels.spec import (
    ALL_GROUPS,
    EncoderSpec,
    LinearSpec,
    PreparedLinear,
    check_bmm,
    check_counts,
    check_input,
    non_finite_error,
    segments_of,
    without_offset,
)

_COLUMNS = 32  # outputs of a tile
_NON_FINITE, _NO_MEMORY = 1, 2  # return codes of kernels.c
_INT16_MAX = 2**15 - 1


@dataclass(frozen=True, eq=False)
class NativeLinear(PreparedLinear):
    """A linear packed for the native backend.

    Attributes:
        descriptor: int64 words of the C struct; holds the addresses of `tensors`.
        tensors: what the descriptor points to, kept alive here.
        segments: number of segments, S.
    """

    name: str
    in_features: int
    out_features: int
    descriptor: Tensor
    tensors: tuple[Tensor, ...]
    segments: int
    address: int
    count_dtype: torch.dtype


class NativeBackend:
    """Collapsed execution in C; bit for bit equal to the reference backend.

    Args:
        definitions: extra compiler flags; `-DSNN_PORTABLE` selects the plain C path.
    """

    name = "native"
    packs_weights = False

    def __init__(self, definitions: tuple[str, ...] = ()) -> None:
        self._definitions = definitions
        self._encoders: weakref.WeakKeyDictionary[EncoderSpec, NativeLinear] = (
            weakref.WeakKeyDictionary()
        )

    @cached_property
    def _library(self) -> ctypes.CDLL:
        return library(self._definitions)

    def available(self) -> str | None:
        """Return None when the library is or can be built, else the reason why not."""
        try:
            _ = self._library
        except compiler.CompilerError as error:
            return str(error)
        return None

    def prepare(self, spec: LinearSpec) -> NativeLinear:
        """Pack the weight and precompute the epilogue's coefficients, once per layer."""
        if spec.levels.device.type != "cpu":
            raise ValueError(
                f"{spec.encoder.name}: the native backend runs on the CPU, the weight is on "
                f"{spec.levels.device}; choose backend='reference' or move the model"
            )
        return _prepare(spec)

    def encode(self, x: Tensor, spec: EncoderSpec) -> Encoding:
        """Encode x [.., K]: counts in original channel order, parameters [.., G]."""
        layer = self._encoders.get(spec)
        if layer is None:
            layer = self._encoders[spec] = _prepare_encoder(spec)
        x32 = _float_rows(x, layer)
        count = torch.empty(x.shape, dtype=_count_dtype(spec))
        threshold = torch.empty(*x.shape[:-1], len(spec.sizes))
        zero_point = torch.empty(threshold.shape, dtype=torch.int32)
        multiple = torch.empty_like(zero_point) if spec.commensurate else None
        code = self._library.snn_encode(
            layer.address,
            x32.data_ptr(),
            count.data_ptr(),
            threshold.data_ptr(),
            zero_point.data_ptr(),
            None if multiple is None else multiple.data_ptr(),
            x.numel() // spec.channels,
            torch.get_num_threads(),
        )
        _check(code, spec.name)
        return Encoding(count, threshold, zero_point, multiple)

    def accumulate(self, x: Tensor, prepared: PreparedLinear) -> Tensor:
        """Return the centred accumulators of x [.., K]: int32 [S, M, N], M the number of rows."""
        layer = _native(prepared)
        x32 = _float_rows(x, layer)
        rows = x.numel() // layer.in_features
        out = torch.empty(layer.segments, rows, layer.out_features, dtype=torch.int32)
        code = self._library.snn_linear(
            layer.address, x32.data_ptr(), None, out.data_ptr(), rows, torch.get_num_threads()
        )
        _check(code, layer.name)
        return out

    def accumulate_counts(
        self, count: Tensor, zero_point: Tensor, prepared: PreparedLinear, active: int = ALL_GROUPS
    ) -> Tensor:
        """Return the centred accumulators of given counts [M, K]: int32 [S, M, N]."""
        layer = _native(prepared)
        check_counts(count, zero_point, layer)
        count, zero_point = count.contiguous(), zero_point.contiguous()
        if count.dtype != layer.count_dtype:
            count = count.to(layer.count_dtype)
        out = torch.empty(layer.segments, len(count), layer.out_features, dtype=torch.int32)
        code = self._library.snn_accumulate(
            layer.address,
            count.data_ptr(),
            zero_point.data_ptr(),
            active,
            out.data_ptr(),
            len(count),
            torch.get_num_threads(),
        )
        _check(code, layer.name)
        return out

    def unrolled(
        self, x: Tensor, prepared: PreparedLinear, steps: tuple[int, ...], levels: int
    ) -> tuple[Tensor, Tensor]:
        """Run the neurons of x [M, K] over their steps in C, one integer matmul per step.

        Args:
            x: float rows.
            prepared: the layer.
            steps: steps of every group.
            levels: L.

        Returns:
            Centred accumulators int32 [S, M, N], and thresholds float32 [M, G] or the unit of
            commensurate ones in their place.
        """
        layer = _native(prepared)
        x32 = _float_rows(x, layer)
        out = torch.empty(layer.segments, len(x), layer.out_features, dtype=torch.int32)
        threshold = torch.empty(len(x), len(steps))
        code = self._library.snn_unrolled(
            layer.address,
            x32.data_ptr(),
            (ctypes.c_int64 * len(steps))(*steps),
            levels,
            out.data_ptr(),
            threshold.data_ptr(),
            len(x),
            torch.get_num_threads(),
        )
        _check(code, layer.name)
        return out, threshold

    def linear(self, x: Tensor, prepared: PreparedLinear, offset: Tensor | None = None) -> Tensor:
        """Return y [.., N] in x.dtype of x [.., K], less an offset if one is given.

        A decoding step makes one call a layer, so what a call costs in Python counts: every
        attribute here is read once.
        """
        if offset is not None:
            return self.linear(without_offset(x, offset), prepared).to(x.dtype)
        layer = _native(prepared)
        if torch.compiler.is_compiling() and not self._definitions:
            check_input(x, layer.in_features, layer.name)
            y: Tensor = native_linear(x, layer.descriptor, layer.out_features, layer.name)
            return y
        return _linear(self._library, x, layer)

    def int_bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a @ b^T` of int8 a [B, M, K] and b [B, N, K]: int32 [B, M, N], exact."""
        check_bmm(a, b)
        if not (a.is_cpu and b.is_cpu):
            raise ValueError(f"int_bmm: expected CPU tensors, got {a.device} and {b.device}")
        a, b = a.contiguous(), b.contiguous()
        (batch, m, k), n = a.shape, b.shape[1]
        out = torch.empty(batch, m, n, dtype=torch.int32)
        code = self._library.snn_int_bmm(
            a.data_ptr(), b.data_ptr(), out.data_ptr(), batch, m, n, k, torch.get_num_threads()
        )
        _check(code, "int_bmm")
        return out


@cache
def library(definitions: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Build and load the C library once per process, with the signatures of its functions.

    Raises:
        CompilerError: it cannot be built or loaded; a later call tries again.
    """
    lib = compiler.load(compiler.build(definitions))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.snn_linear.argtypes = [pointer] * 4 + [size, number]
    lib.snn_accumulate.argtypes = [pointer] * 3 + [ctypes.c_uint64, pointer, size, number]
    lib.snn_unrolled.argtypes = [pointer] * 3 + [size, pointer, pointer, size, number]
    lib.snn_encode.argtypes = [pointer] * 6 + [size, number]
    lib.snn_int_bmm.argtypes = [pointer] * 3 + [size] * 4 + [number]
    heads: list[Any] = [*[pointer] * 5, size, pointer, pointer, size, size]
    lib.snn_encode_heads.argtypes = [*heads, pointer, pointer, number]
    lib.snn_attention_scores.argtypes = [pointer] * 6 + [size, ctypes.c_float, pointer, number]
    lib.snn_decode_heads.argtypes = [pointer] + [size] * 3 + [pointer] * 3 + [number]
    lib.snn_decode_heads.restype = None
    lib.snn_rotate.argtypes = [pointer] * 3 + [size] * 4 + [pointer] * 2 + [size, number, number]
    lib.snn_rotate.restype = None
    lib.snn_head.argtypes = [pointer] * 4 + [size] * 3 + [number]
    lib.snn_head.restype = None
    return lib


def _linear(lib: ctypes.CDLL, x: Tensor, layer: NativeLinear) -> Tensor:
    """Call the C linear on x [.., K]; other dtypes than float32 are converted around it."""
    x32 = _float_rows(x, layer)
    shape = x32.shape
    y = torch.empty(*shape[:-1], layer.out_features, dtype=torch.float32)
    code = lib.snn_linear(
        layer.address,
        x32.data_ptr(),
        y.data_ptr(),
        None,
        shape[0] if len(shape) == 2 else x32.numel() // shape[-1],
        torch.get_num_threads(),
    )
    if code:
        _check(code, layer.name)
    return y if x32 is x else y.to(x.dtype)


def _float_rows(x: Tensor, layer: NativeLinear) -> Tensor:
    """Return x as a contiguous float32 CPU tensor: itself, when it is one with K channels."""
    good = x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()
    if good and x.dim() and x.shape[-1] == layer.in_features:
        return x
    check_input(x, layer.in_features, layer.name)
    if not x.is_cpu:
        raise ValueError(
            f"{layer.name}: the native backend runs on the CPU, the input is on {x.device}; "
            "prepare the layer again after moving the model"
        )
    return x.detach().to(torch.float32).contiguous()


@torch.library.custom_op("snnllm::native_linear", mutates_args=(), device_types="cpu")
def native_linear(x: Tensor, descriptor: Tensor, out_features: int, name: str) -> Tensor:
    """Run the native linear as an operator that torch.compile can place in a graph.

    The descriptor stands for the prepared layer, which its module keeps alive.
    """
    address = descriptor.data_ptr()
    shape = (x.shape[-1], out_features)
    layer = NativeLinear(name, *shape, descriptor, (), 0, address, torch.uint8)
    return _linear(library(), x, layer)


@native_linear.register_fake
def _(x: Tensor, descriptor: Tensor, out_features: int, name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _check(code: int, name: str) -> None:
    if code == _NON_FINITE:
        raise non_finite_error(name)
    if code == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the spike counts; use a smaller batch")


def _native(prepared: PreparedLinear) -> NativeLinear:
    if not isinstance(prepared, NativeLinear):
        raise TypeError(
            f"{prepared.name}: prepared by another backend ({type(prepared).__name__}); "
            "prepare it again with this backend"
        )
    return prepared


def _count_dtype(spec: EncoderSpec) -> torch.dtype:
    return torch.uint8 if max(spec.capacities) <= 255 else torch.int16


def _prepare(spec: LinearSpec) -> NativeLinear:
    encoder = spec.encoder
    layout = choose_layout(spec.weight_bits, max(encoder.capacities))
    starts, padded = padded_starts(spec.segments)
    levels = torch.zeros(-(-spec.out_features // _COLUMNS) * _COLUMNS, padded, dtype=torch.int8)
    shape = (len(spec.segments), levels.shape[0])
    scale = torch.zeros(shape)
    low, high = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    n = spec.out_features
    for i, (start, stop, _, weight_group) in enumerate(spec.segments):
        level, zero = spec.levels[:, start:stop], spec.zero[:, weight_group]
        levels[:n, starts[i] : starts[i] + stop - start] = level
        scale[i, :n] = spec.scale[:, weight_group]
        level_sum = level.sum(1, dtype=torch.int32) - zero * (stop - start)
        shifted = zero + (8 if layout == NIBBLE else 0)
        low[i, :n] = int16_pair(shifted, level_sum & _INT16_MAX)
        high[i, :n] = int16_pair(shifted, level_sum >> 15)
    bias = None if spec.bias is None else pad(spec.bias.detach(), (0, shape[1] - n))
    weight = pack_levels(levels, layout)
    words = segment_words(spec.segments, starts, encoder, layout, spec.weight_bits)
    weights = (weight, scale, low, high, bias)
    return _describe(encoder, (n, *levels.shape), layout, words, weights, spec.merged)


def _prepare_encoder(spec: EncoderSpec) -> NativeLinear:
    """Describe a layer without outputs, for `encode`."""
    segments = segments_of(spec.sizes)
    starts, padded = padded_starts(segments)
    layout = BYTE if _count_dtype(spec) is torch.uint8 else WIDE
    words = segment_words(segments, starts, spec, layout, 1)
    return _describe(spec, (0, 0, padded), layout, words, (None,) * 5)


def _describe(
    encoder: EncoderSpec,
    sizes: tuple[int, int, int],
    layout: int,
    segment_words: Tensor,
    weights: tuple[Tensor | None, ...],
    merged: bool = False,
) -> NativeLinear:
    """Write the C struct `Layer`; sizes are N, padded N and padded K."""
    n, padded_n, padded_k = sizes
    order = None if encoder.order is None else encoder.order.to("cpu", torch.int32).contiguous()
    group_sizes = torch.tensor(encoder.sizes, dtype=torch.int64)
    capacities = torch.tensor(encoder.capacities, dtype=torch.int64)
    pointed = (encoder.clip_factors, order, group_sizes, capacities, segment_words, *weights)
    words = [encoder.channels, n, padded_k, padded_n, len(encoder.sizes), len(segment_words)]
    words += [layout, encoder.range_mode, int(merged)]
    words += [0 if tensor is None else tensor.data_ptr() for tensor in pointed]
    descriptor = torch.tensor(words, dtype=torch.int64)
    tensors = tuple(tensor for tensor in pointed if tensor is not None)
    return NativeLinear(
        encoder.name,
        encoder.channels,
        n,
        descriptor,
        tensors,
        len(segment_words),
        descriptor.data_ptr(),
        torch.int16 if layout == WIDE else torch.uint8,
    )
