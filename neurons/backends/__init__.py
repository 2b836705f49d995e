"""Backends of the neurons: the torch reference, Triton and CuPy kernels, and which can run.

:func:`multi_step` runs a layer of neurons over time on any of them. The integers are the same on
all, bit for bit; the gradients are the same up to the order of float32 sums.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from neurons.backends import encode_ops, ops, torch_backend
from neurons.backends.device import interpreted
from neurons.backends.spec import (
    DTYPES,
    Dynamics,
    Output,
    Reset,
    Train,
    check_spike_dtype,
)

__all__ = [
    "BACKENDS",
    "Dynamics",
    "Output",
    "Reset",
    "Train",
    "available_backends",
    "check_backend",
    "check_encode_backend",
    "choose",
    "choose_encode",
    "encode",
    "multi_step",
]

BACKENDS = ("auto", "torch", "triton", "cupy")
ENCODE_BACKENDS = ("auto", "torch", "triton")
INSTALL = {"triton": "pip install 'snnllm[triton]'", "cupy": "pip install 'snnllm[cupy]'"}
_INSTALLED = {"torch": True} | {name: find_spec(name) is not None for name in INSTALL}


def available_backends() -> tuple[str, ...]:
    """Backends whose package is installed, "torch" first; kernels need a CUDA device, too."""
    return tuple(name for name, installed in _INSTALLED.items() if installed)


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist or is not installed.

    Args:
        backend: one of `BACKENDS`.

    Raises:
        ValueError: if there is none of this name.
        ImportError: if its package is missing; names the install command.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    if backend != "auto" and not _INSTALLED[backend]:
        raise ImportError(
            f"backend={backend!r} needs the package {backend}, which is not installed; run "
            f'`{INSTALL[backend]}`, or choose backend="torch".'
        )


def _refusal(backend: str, x_seq: Tensor) -> str | None:
    """Why a kernel cannot take this input; None if it can."""
    on_cpu = backend == "triton" and interpreted() and x_seq.device.type == "cpu"
    if not x_seq.is_cuda and not on_cpu:
        return f"a CUDA tensor, got one on {x_seq.device}; move the input"
    if x_seq.dtype not in DTYPES:
        return f"one of {[str(dtype) for dtype in DTYPES]}, got {x_seq.dtype}; convert the input"
    return None


def choose(backend: str, x_seq: Tensor) -> str:
    """The backend that runs an input: "auto" takes Triton on CUDA tensors, torch otherwise.

    Args:
        backend: one of `BACKENDS`.
        x_seq: the input ``[T, *]``.

    Returns:
        "torch", "triton" or "cupy".

    Raises:
        ValueError: if there is no such backend, or the chosen one cannot take the input.
        ImportError: if its package is missing.
    """
    if backend == "auto":
        suits = _INSTALLED["triton"] and x_seq.is_cuda and _refusal("triton", x_seq) is None
        return "triton" if suits else "torch"
    check_backend(backend)
    reason = None if backend == "torch" else _refusal(backend, x_seq)
    if reason is not None:
        raise ValueError(f'backend={backend!r} needs {reason}, or choose backend="torch".')
    return backend


MAX_ENCODE_GROUPS = 16  # the encoder's kernel is unrolled over the groups


def check_encode_backend(backend: str) -> None:
    """Refuse a backend that encodes nothing: there is "auto", "torch" and "triton".

    Raises:
        ValueError: if there is none of this name.
        ImportError: if its package is missing; names the install command.
    """
    if backend not in ENCODE_BACKENDS:
        raise ValueError(
            f"backend of an encoder must be one of {ENCODE_BACKENDS}, got {backend!r}."
        )
    check_backend(backend)


def choose_encode(backend: str, x: Tensor, groups: int) -> str:
    """The backend that encodes x ``[.., C]`` with G groups: "torch" or "triton".

    "auto" takes torch where gradients are recorded: those of the thresholds exist only there.

    Raises:
        ValueError: if there is no such backend, or the chosen one cannot take the input.
        ImportError: if its package is missing.
    """
    check_encode_backend(backend)
    if backend == "auto":
        recorded = x.requires_grad and torch.is_grad_enabled()
        suits = groups <= MAX_ENCODE_GROUPS and not recorded
        return choose(backend, x) if suits else "torch"
    if backend == "triton" and groups > MAX_ENCODE_GROUPS:
        raise ValueError(
            f"backend='triton' encodes at most {MAX_ENCODE_GROUPS} channel groups, got {groups}; "
            'give more channels the same steps, or choose backend="torch".'
        )
    return choose(backend, x)


def encode(
    x: Tensor, channel_group: Tensor, capacities: Sequence[int], clip: Tensor, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode in one Triton kernel; see :func:`neurons.backends.encode_ops.encode`."""
    encoded: tuple[Tensor, Tensor, Tensor] = encode_ops.encode(
        x.detach(), channel_group, list(capacities), clip, shared
    )
    return encoded


def multi_step(
    x_seq: Tensor,
    dynamics: Dynamics,
    v: Tensor | float = 0.0,
    steps_per_channel: Tensor | None = None,
    step: Tensor | int = 0,
    output: Output | str = Output.SPIKES,
    dtype: torch.dtype | None = None,
    store_v_seq: bool = False,
    store_v: bool = True,
    backend: str = "auto",
) -> Train:
    """Run a layer of neurons over all steps of its input.

    Args:
        x_seq: charges ``[T, *]`` in the units of the threshold, float32, bfloat16 or float16 (any
            floating dtype on "torch"), any strides.
        dynamics: the neurons; the equations are in :mod:`neurons.backends.spec`.
        v: membrane before the first step, in thresholds: float32 ``[*]``, or one value for all,
            which costs no memory traffic.
        steps_per_channel: integers that broadcast to the trailing axes of one step; a channel with
            n fires in steps ``0..n-1`` only. None: all.
        step: index of the first of these steps, int or int32 ``[]``.
        output: "spikes", or "count" for their sum over time.
        dtype: of the spikes; None: that of x_seq. Integers (int8) carry no gradient.
        store_v_seq: return the membrane of every step.
        store_v: return the last membrane; False saves its traffic on the kernels.
        backend: "auto", "torch", "triton" or "cupy".

    Returns:
        The spikes or counts, and the membranes asked for.

    Raises:
        TypeError: if x_seq is not floating point.
        ValueError: if x_seq holds no step, the dtype cannot hold the spikes, or the backend cannot
            take the input.
        ImportError: if the backend is not installed.
    """
    if not x_seq.is_floating_point():
        raise TypeError(f"x_seq must be floating point, got {x_seq.dtype}.")
    if x_seq.dim() == 0 or x_seq.shape[0] == 0:
        raise ValueError("x_seq must be [T, *] with at least one time step, got T = 0.")
    output, dtype = Output(output), dtype or x_seq.dtype
    steps = x_seq.shape[0] if output == Output.COUNT else 1
    check_spike_dtype(dtype, dynamics, steps * (dynamics.levels - 1))
    kernel = choose(backend, x_seq)
    if kernel != "torch":
        return ops.multi_step(
            x_seq,
            dynamics,
            v,
            steps_per_channel,
            step,
            output,
            dtype,
            store_v_seq,
            store_v,
            kernel,
        )
    train = torch_backend.multi_step(
        x_seq, dynamics, v, steps_per_channel, step, output, dtype, store_v_seq
    )
    return train if store_v else train._replace(v=train.v.new_empty(0))
