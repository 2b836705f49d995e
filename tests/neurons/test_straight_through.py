"""The differentiable encoding: the forward of the encoder bit for bit, straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neurons import SpikeEncoder
from neurons.straight_through import levels_through, spikes_through


@given(
    seed=st.integers(0, 1 << 20),
    bits=st.integers(1, 8),
    steps=st.sampled_from([(1,), (1, 2), (2, 1, 4)]),
    value_range=st.sampled_from(["split", "shared"]),
    heads=st.booleans(),
)
def test_the_forward_is_the_encoder(seed, bits, steps, value_range, heads):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 11) if heads else (11,)
    group = torch.randint(len(steps), shape, generator=generator).to(torch.uint8)
    clip = (torch.rand(len(steps), generator=generator) * 0.5 + 0.5).tolist()
    encoder = SpikeEncoder(group, steps, bits, value_range, clip=clip)
    x = torch.randn(2, 3, 5, 11, generator=generator) * 3
    capacity = torch.tensor(encoder.capacities).float()
    found = spikes_through(x, group, capacity, value_range == "shared", encoder.clip)
    assert torch.equal(found, encoder.decode(encoder.encode(x)))


def test_gradients_pass_inside_and_reach_the_range():
    threshold = torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([-9.0, -0.6, 0.1, 0.8, 9.0], requires_grad=True)
    out = levels_through(x, threshold, torch.tensor([2.0]), torch.tensor(5.0))
    assert out.tolist() == [-1.0, -0.5, 0.0, 1.0, 1.5]
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    # q - z outside; (q - z) - x/s inside.
    expected = -2 + (-1 + 1.2) + (0 - 0.2) + (2 - 1.6) + 3
    assert float(threshold.grad) == pytest.approx(expected, abs=1e-5)


def test_clip_factors_learn():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    clip = torch.ones(1, requires_grad=True)
    group, capacity = torch.zeros(16, dtype=torch.uint8), torch.tensor([3.0])
    losses = []
    for _ in range(40):
        loss = (spikes_through(x, group, capacity, clip=clip) - x).square().mean()
        (gradient,) = torch.autograd.grad(loss, clip)
        losses.append(float(loss.detach()))
        clip = (clip - 0.3 * gradient).detach().requires_grad_()
    assert losses[-1] < 0.97 * losses[0]
    assert float(clip) < 1.0
