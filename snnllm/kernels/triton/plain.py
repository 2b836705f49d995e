"""Rows as they are to spike counts on a GPU, as an operator of torch: in CUDA C++ where it serves, else in Triton."""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from torch import Tensor

from neurons.backends.operator import operator
from neurons.backends.triton_encode import encode_rows, outputs
from snnllm.kernels.cuda.encode_plain import PlainRows, plain_launch


@operator("snnllm::encode_plain_rows")
def encode_plain_rows(
    x: Tensor,
    order: Tensor,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    runs: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`neurons.backends.triton_encode.encode_rows` with `runs`, bit for bit."""
    rows = PlainRows(x, offset, capacities, clip, runs, range_mode)
    if len(x) == 0 or rows.unsuitable() is not None:
        layout = (order, segments, capacities, clip, range_mode)
        count, threshold, zero_point, count_sum = encode_rows(x, *layout, offset, runs)
        return count, threshold, zero_point, count_sum
    out = outputs(x, len(order), len(capacities), len(segments))
    plain_launch(rows, out)(x.device)
    return out


@encode_plain_rows.register_fake
def _(
    x: Tensor,
    order: Tensor,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    runs: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return outputs(x, len(order), len(capacities), len(segments))
