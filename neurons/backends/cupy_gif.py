"""GIF neurons as CUDA C through CuPy: the kernels of :mod:`neurons.backends.triton_gif`, by hand.

For machines without Triton. They compile once for each dtype and variant and run on torch's current
stream. ``__fmul_rn``, ``__fadd_rn`` and ``__fdiv_rn`` keep the compiler from contracting or
approximating, so the integers are those of the reference.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neurons.backends.cupy_source import SOURCE
from neurons.backends.spec import Dynamics, Reset

__all__ = ["backward", "forward", "macros"]

_THREADS = 256
_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
}


def forward(
    x_seq: Tensor,
    v: Tensor | None,
    v_init: float,
    steps: Tensor | None,
    step: Tensor | None,
    dynamics: Dynamics,
    count: bool,
    spikes: Tensor,
    v_out: Tensor,
    v_seq: Tensor,
    gates: Tensor,
) -> None:
    """Launch the forward kernel; arguments as in :func:`neurons.backends.triton_gif.forward`."""
    neurons, (lower, upper) = x_seq[0].numel(), dynamics.bounds
    channels = 1 if steps is None else steps.numel()
    flags = _flags(dynamics, count, neurons, x_seq, v, spikes, v_out, v_seq, gates)
    flags |= {"SIGNED": dynamics.signed, "GATES": gates.shape[0]}
    flags |= {"STORE_V": v_out.numel() > 0, "STORE_V_SEQ": v_seq.numel() > 0}
    flags |= {"HAS_V": v is not None}
    flags |= {"HAS_STEPS": steps is not None, "HAS_STEP": step is not None}
    _launch(
        "gif_forward",
        macros(x_seq.dtype, spikes.dtype, **flags),
        x_seq.device,
        neurons,
        (x_seq, v, steps, step, spikes, v_out, v_seq, gates),
        (neurons, x_seq.shape[0], channels),
        (v_init, dynamics.v_threshold, dynamics.decay, dynamics.levels - 1, lower, upper),
    )


def backward(
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    gates: Tensor,
    dynamics: Dynamics,
    count: bool,
    grad_x: Tensor,
    grad_v_init: Tensor,
) -> None:
    """Launch the backward kernel; arguments as in :func:`neurons.backends.triton_gif.backward`."""
    neurons = grad_x[0].numel()
    given = (grad_spikes, grad_v, grad_v_seq)
    flags = _flags(dynamics, count, neurons, *given, gates, grad_x, grad_v_init)
    flags |= {"DETACH": dynamics.detach_reset, "STORE_V": grad_v_init.numel() > 0}
    flags |= {"HAS_SPIKES": grad_spikes is not None, "HAS_V": grad_v is not None}
    flags |= {"HAS_V_SEQ": grad_v_seq is not None}
    _launch(
        "gif_backward",
        macros(grad_x.dtype, grad_x.dtype if grad_spikes is None else grad_spikes.dtype, **flags),
        grad_x.device,
        neurons,
        (*given, gates, grad_x, grad_v_init),
        (neurons, grad_x.shape[0]),
        (dynamics.v_threshold, dynamics.decay),
    )


def macros(x: torch.dtype, spike: torch.dtype, **flags: int) -> tuple[str, ...]:
    """Compiler options that choose the variant of the source.

    Args:
        x: dtype of the charges.
        spike: dtype of the spikes.
        **flags: values of the macros of the source.

    Returns:
        One ``-D`` option each.

    Raises:
        ValueError: if there is no variant for a dtype of the spikes.
    """
    if spike not in _TYPES:
        known = ", ".join(str(dtype) for dtype in _TYPES)
        raise ValueError(f"the CuPy kernels write spikes as one of {known}, got {spike}.")
    types = (f"-DX={_TYPES[x]}", f"-DS={_TYPES[spike]}")
    return types + tuple(f"-D{name}={int(value)}" for name, value in sorted(flags.items()))


def _flags(
    dynamics: Dynamics, count: bool, neurons: int, *tensors: Tensor | None
) -> dict[str, int]:
    # Four neurons a thread where every row starts at a multiple of four elements.
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    return {
        "HARD": dynamics.reset == Reset.HARD,
        "DIVIDE": dynamics.v_threshold != 1.0,
        "LEAKY": dynamics.decay != 1.0,
        "COUNT": count,
        "WIDTH": 4 if aligned and neurons % 4 == 0 else 1,
    }


@cache
def _kernel(name: str, options: tuple[str, ...], device: int) -> Any:
    return import_module("cupy").RawKernel(SOURCE, name, options=options)


def _launch(
    name: str,
    options: tuple[str, ...],
    device: torch.device,
    neurons: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    scalars: tuple[float, ...],
) -> None:
    cuda = import_module("cupy").cuda
    index = torch.cuda.current_device() if device.index is None else device.index
    width = 4 if "-DWIDTH=4" in options else 1
    blocks = -(-neurons // (_THREADS * width))
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    arguments = (*pointers, *sizes, *(float(value) for value in scalars))
    with cuda.Device(index), _stream(cuda, torch.cuda.current_stream(device).cuda_stream):
        _kernel(name, options, index)((blocks,), (_THREADS,), arguments)


def _stream(cuda: Any, pointer: int) -> Any:
    """A stream of torch for CuPy: by the stream protocol since CuPy 14, by its address before."""
    if hasattr(cuda.Stream, "from_external"):
        return cuda.Stream.from_external(_Stream(pointer))
    return cuda.ExternalStream(pointer)


class _Stream:
    """A stream by its address: not every torch that runs here has the protocol on its streams."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer
