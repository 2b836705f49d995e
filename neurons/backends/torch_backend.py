"""The reference: the functional loop, on any device that torch runs on."""

import torch
from torch import Tensor

from neurons import functional
from neurons.backends.spec import Dynamics, Output, Reset, Train

__all__ = ["multi_step"]


def multi_step(
    x_seq: Tensor,
    dynamics: Dynamics,
    v: Tensor | float,
    steps_per_channel: Tensor | None,
    step: Tensor | int,
    output: Output,
    dtype: torch.dtype,
    store_v_seq: bool,
    fire: functional.FireRule | None = None,
) -> Train:
    """Run the neurons step by step.

    Args as in :func:`neurons.backends.multi_step`; `fire` is a firing rule with another gradient
    than that of the dynamics.
    """
    charge = functional.to_thresholds(x_seq, dynamics.v_threshold)
    if not isinstance(v, Tensor):
        v = torch.full_like(charge[0], v, requires_grad=False)
    fire, hard = fire or dynamics.surrogate(), dynamics.reset == Reset.HARD
    spikes, membranes = [], []
    for t in range(x_seq.shape[0]):
        fires = None if steps_per_channel is None else steps_per_channel > step + t
        if hard:
            spike, v = functional.hard_reset_step(charge[t], v, fire, fires, dynamics.decay)
        else:
            spike, v = functional.soft_reset_step(
                charge[t], v, fire, fires, dynamics.detach_reset, dynamics.decay
            )
        spikes.append(spike)
        if store_v_seq:
            membranes.append(v)
    train = torch.stack(spikes)
    if output == Output.COUNT:
        train = train.sum(0)
    return Train(train.to(dtype), v, torch.stack(membranes) if store_v_seq else None)
