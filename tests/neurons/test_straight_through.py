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
    low, high = torch.tensor([0.5], requires_grad=True), torch.tensor([0.8], requires_grad=True)
    x = torch.tensor([-2.0, -0.6, 0.1, 0.8, 5.0], requires_grad=True)  # range -1..4, s = 1, z = 1
    group, capacity = torch.zeros(5, dtype=torch.uint8), torch.tensor([5.0])
    out = levels_through(x, low, high, group, capacity)
    assert out.tolist() == [-1.0, -1.0, 0.0, 1.0, 4.0]
    out.sum().backward()
    # dx_hat/ds: q - z outside, (q - z) - x/s inside.
    by_scale = -1 + (-1 + 0.6) + (0 - 0.1) + (1 - 0.8) + 4
    expected = [-by_scale * 0.5 / 5, 1.0, 1.0, 1.0, by_scale * 0.8 / 5]
    assert x.grad.tolist() == pytest.approx(expected, abs=1e-5)
    assert float(low.grad) == pytest.approx(by_scale * 2.0 / 5, abs=1e-5)
    assert float(high.grad) == pytest.approx(by_scale * 5.0 / 5, abs=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_equations(shared):
    """Against automatic differentiation of the forward with z and the rounding held fixed."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 4, 10, generator=generator).requires_grad_()
    group = (torch.arange(10) % 3 == 0).to(torch.uint8)
    capacity, clip = torch.tensor([15.0, 30.0]), torch.tensor([0.9, 0.7], requires_grad=True)
    upstream = torch.randn(x.shape, generator=generator)
    found = torch.autograd.grad(
        (spikes_through(x, group, capacity, shared, clip) * upstream).sum(), [x, clip]
    )

    def range_of(members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = x if shared else torch.where(members, x, 0.0)
        return part.amin(-1, keepdim=True).clamp(max=0), part.amax(-1, keepdim=True).clamp(min=0)

    total = torch.zeros(())
    for g in range(2):
        members = group == g
        lo, hi = range_of(members)
        s = (hi - lo) * clip[g] / capacity[g]
        z = torch.round(-lo * clip[g] / s).detach()
        charge = x / s
        rounded = charge + (torch.floor(charge + (z + 0.5)) - z - charge).detach()
        x_hat = s * (rounded + z).clamp(0, float(capacity[g])) - s * z
        total = total + (torch.where(members, x_hat, 0.0) * upstream).sum()
    for ours, expected in zip(found, torch.autograd.grad(total, [x, clip]), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_clip_factors_learn():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    clip = torch.ones(1, requires_grad=True)
    group, capacity = torch.zeros(16, dtype=torch.uint8), torch.tensor([3.0])
    losses = []
    for _ in range(40):
        loss = (spikes_through(x, group, capacity, False, clip) - x).square().mean()
        (gradient,) = torch.autograd.grad(loss, clip)
        losses.append(float(loss.detach()))
        clip = (clip - 0.3 * gradient).detach().requires_grad_()
    assert losses[-1] < 0.97 * losses[0]
    assert float(clip) < 1.0
