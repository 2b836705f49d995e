"""The spikes are the neuron's; the gradient is straight through over its range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import surrogate

from neurons import GIFNode, GIFSpikeCount, SignedGIFNode, SignedSpikeCount, functional

SURROGATES = [GIFSpikeCount, SignedSpikeCount]


@pytest.mark.parametrize("levels", [2, 4, 16])
@pytest.mark.parametrize(
    ("surrogate_class", "rule"),
    [(GIFSpikeCount, functional.gif_fire), (SignedSpikeCount, functional.signed_gif_fire)],
)
def test_forward_is_the_firing_rule(surrogate_class, rule, levels):
    h = (torch.randn(1000) * levels).round(decimals=1).requires_grad_()
    spike = surrogate_class(levels - 1)(h)
    assert torch.equal(spike, rule(h.detach(), levels))
    assert spike.requires_grad
    with torch.no_grad():
        assert torch.equal(surrogate_class(levels - 1)(h), spike)


def test_gradient_windows():
    h = torch.tensor([-4.0, -3.0, 0.25, 0.5, 3.5, 3.75], requires_grad=True)
    (grad,) = torch.autograd.grad(GIFSpikeCount(3)(h).sum(), h)
    assert grad.tolist() == [0, 0, 0, 1, 1, 0]
    (grad,) = torch.autograd.grad(SignedSpikeCount(3)(h).sum(), h)
    assert grad.tolist() == [0, 1, 1, 1, 0, 0]
    (grad,) = torch.autograd.grad(SignedSpikeCount(3, grad_window=(0.0, 3.6))(h).sum(), h)
    assert grad.tolist() == [0, 0, 1, 1, 1, 0]


def test_gradient_equals_multi_level_spike_count_shifted_by_half():
    h = torch.randn(500, requires_grad=True)
    with torch.no_grad():
        h *= 6
    (own,) = torch.autograd.grad(GIFSpikeCount(3)(h).sum(), h)
    (stock,) = torch.autograd.grad(surrogate.MultiLevelSpikeCount(3)(h - 0.5).sum(), h)
    assert torch.equal(own, stock)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    levels=st.sampled_from([2, 4, 16]),
    steps=st.integers(1, 6),
    node_class=st.sampled_from([GIFNode, SignedGIFNode]),
    seed=st.integers(0, 2**16),
)
def test_gradient_of_the_count_is_that_of_the_closed_form(levels, steps, node_class, seed):
    """Through fire and reset, d(sum s)/dX = 1 within the capacity and 0 beyond."""
    generator = torch.Generator().manual_seed(seed)
    capacity = steps * (levels - 1)
    charge = torch.randn(64, generator=generator) * capacity
    charge.requires_grad_()
    x_seq = torch.cat([charge[None], torch.zeros(steps - 1, 64)])
    (grad,) = torch.autograd.grad(node_class(levels, step_mode="m")(x_seq).sum(), charge)
    lowest = 0 if node_class is GIFNode else -capacity
    assert torch.equal(grad, ((charge >= lowest) & (charge <= capacity)).float())


@pytest.mark.parametrize("surrogate_class", SURROGATES)
def test_primitive_is_continuous(surrogate_class):
    fire = surrogate_class(3)
    fire.set_spiking_mode(False)
    h = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    out = fire(h)
    expected = (h - 0.5).clamp(0, 3) if surrogate_class is GIFSpikeCount else h.clamp(-3, 3)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("surrogate_class", SURROGATES)
def test_bad_arguments(surrogate_class):
    with pytest.raises(TypeError, match="must be an integer"):
        surrogate_class(1.5)
    with pytest.raises(ValueError, match="must be >= 1"):
        surrogate_class(0)
    with pytest.raises(ValueError, match="grad_min <= grad_max"):
        surrogate_class(3, grad_window=(1.0, 0.0))


def test_repr_shows_parameters():
    text = repr(SignedSpikeCount(3))
    assert "max_spike_count=3" in text
    assert "grad_min=-3.0" in text
