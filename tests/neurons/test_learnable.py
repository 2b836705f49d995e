"""Learned thresholds: equations, gradients against autograd and the closed form, backends."""

import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neurons import (
    ElasticBiSpikingNode,
    GIFNode,
    LearnableGIFNode,
    LearnableSignedGIFNode,
    SignedGIFNode,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ["triton"] if importlib.util.find_spec("triton") else []
FIXED = {LearnableGIFNode: GIFNode, LearnableSignedGIFNode: SignedGIFNode}
learnable = pytest.mark.parametrize("node_class", list(FIXED))
every = pytest.mark.parametrize("node_class", [*FIXED, ElasticBiSpikingNode])


def charges(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(DEVICE)


@learnable
def test_spikes_are_those_of_the_fixed_threshold(node_class):
    x_seq = charges(4, 5, 3)
    node = node_class(4, 0.7, step_mode="m", decay=0.5).to(DEVICE)
    fixed = FIXED[node_class](4, 0.7, step_mode="m", decay=0.5)
    assert torch.equal(node(x_seq), fixed(x_seq))
    assert torch.equal(node.v, fixed.v)
    assert list(node.state_dict()) == ["threshold"]


@learnable
def test_threshold_of_each_channel(node_class):
    x_seq = charges(4, 5, 3)
    node = node_class(4, [0.5, 1.0, 2.0], step_mode="m").to(DEVICE)
    spikes = node(x_seq)
    for channel, threshold in enumerate((0.5, 1.0, 2.0)):
        fixed = FIXED[node_class](4, threshold, step_mode="m")
        assert torch.equal(spikes[..., channel], fixed(x_seq[..., channel]))


@learnable
def test_gradient_of_the_threshold_is_that_of_learned_step_sizes(node_class):
    """One step: ds/dtheta = -x / theta^2 within the window, over sqrt(N D)."""
    x = charges(1, 200)
    node = node_class(4, 0.7, step_mode="m").to(DEVICE)
    weight = charges(1, 200, seed=1)
    (grad,) = torch.autograd.grad((node(x) * weight).sum(), node.threshold)
    u, lower = x / 0.7, 0.0 if node_class is LearnableGIFNode else -3.0
    inside = (u >= lower) & (u <= 3)
    expected = -(weight * x / 0.7**2)[inside].sum() / math.sqrt(200 * 3)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def elastic(x_seq: Tensor, alpha: float, decay: float) -> tuple[Tensor, Tensor]:
    """The equations of the class, word for word, and the last membrane in real units."""
    v, outputs = torch.zeros_like(x_seq[0]), []
    for x in x_seq:
        m = v + x
        s = (m / alpha).round().clamp(-1, 1)
        outputs.append(alpha * s)
        v = torch.where(s == 0, decay * m, 0.0)
    return torch.stack(outputs), v


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 6),
    alpha=st.sampled_from([0.5, 1.0, 4.0]),
    decay=st.sampled_from([0.25, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_elastic_neuron_is_its_equations(steps, alpha, decay, seed):
    """Dyadic charges and parameters, so that dividing by alpha changes no bit."""
    x_seq = (charges(steps, 6, seed=seed) * 16).round() / 16
    node = ElasticBiSpikingNode(alpha, decay, step_mode="m").to(DEVICE)
    outputs, v = elastic(x_seq, alpha, decay)
    assert torch.equal(node(x_seq), outputs)
    assert torch.equal(node.v * alpha * decay, v)  # ours leaks when it is charged


def test_elastic_gradients_are_those_of_the_public_code():
    """One step: LSQ with levels -1, 0, 1."""
    x = charges(1, 300).requires_grad_()
    node, weight = ElasticBiSpikingNode(1.5, step_mode="m").to(DEVICE), charges(1, 300, seed=1)
    grad_x, grad_alpha = torch.autograd.grad((node(x) * weight).sum(), (x, node.threshold))
    u = x.detach() / 1.5
    middle = u.abs() <= 1
    assert torch.allclose(grad_x, torch.where(middle, weight, 0.0), atol=1e-5)
    slope = torch.where(middle, u.round() - u, u.sign())
    expected = (slope * weight).sum() / math.sqrt(300)
    torch.testing.assert_close(grad_alpha, expected, rtol=1e-4, atol=1e-4)


def test_elastic_spikes_pass_no_gradient_to_later_steps():
    x_seq = torch.tensor([[3.0, 0.25], [0.25, 0.25]], device=DEVICE, requires_grad=True)
    node = ElasticBiSpikingNode(1.0, 0.5, step_mode="m").to(DEVICE)
    (grad,) = torch.autograd.grad(node(x_seq)[1].sum(), x_seq)
    assert grad.tolist() == [[0.0, 0.5], [1.0, 1.0]]


def test_calibration_sets_the_firing_rate():
    x_seq = charges(2, 1000)
    rates = []
    for ratio in (1.0, 2.0, 4.0):
        node = ElasticBiSpikingNode(step_mode="m").to(DEVICE)
        node.calibrate(x_seq, ratio)
        assert node.threshold.item() == pytest.approx(ratio * float(x_seq.abs().mean()))
        rates.append(float((node(x_seq) != 0).float().mean()))
    assert rates[0] > rates[1] > rates[2] > 0


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree(node_class, dtype, mode, kernel):
    x_seq = charges(5, 6, 4).to(dtype).requires_grad_()
    weight, results = charges(5, 6, 4, seed=1), []
    for backend in ("torch", kernel):
        node = node_class(step_mode=mode, backend=backend).to(DEVICE)
        y = node(x_seq) if mode == "m" else torch.stack([node(x) for x in x_seq])
        assert y.dtype == dtype
        loss = (y.float() * weight).sum() + node.v.sum()
        results.append((y, node.v, *torch.autograd.grad(loss, (x_seq, node.threshold))))
    for ours, theirs in zip(results[1][:2], results[0][:2], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(results[1][2:], results[0][2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@every
def test_thresholds_learn(node_class):
    """The loss falls, and the threshold takes part in it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), node_class(step_mode="m"), nn.Linear(16, 2)).to(DEVICE)
    x, label = charges(2, 64, 6), (charges(2, 64, 6)[0, :, 0] > 0).long()
    before = net[1].threshold.item()
    optimizer, losses = torch.optim.Adam(net.parameters(), 0.02), []
    for _ in range(80):
        net[1].reset()
        losses.append(nn.functional.cross_entropy(net(x).mean(0), label))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert net[1].threshold.item() != before


@every
def test_a_threshold_below_zero_is_floored(node_class):
    node = node_class(step_mode="m").to(DEVICE)
    with torch.no_grad():
        node.threshold.fill_(-1.0)
    assert node(charges(2, 3)).isfinite().all()
    assert node.effective_threshold(3).item() == pytest.approx(1e-5)


@every
def test_compile_and_repr(node_class):
    torch.compiler.reset()
    x_seq, node = charges(3, 4, 6), node_class(step_mode="m").to(DEVICE)
    expected = node(x_seq)
    node.reset()
    assert torch.equal(torch.compile(node, fullgraph=True, backend="aot_eager")(x_seq), expected)
    assert "threshold=()" in repr(node)


@learnable
@pytest.mark.parametrize("threshold", [0.0, -1.0, float("inf"), float("nan"), []])
def test_bad_thresholds(node_class, threshold):
    with pytest.raises(ValueError, match="threshold must be positive and finite"):
        node_class(4, threshold)


def test_calibration_on_zeros():
    with pytest.raises(ValueError, match="calibrate needs finite inputs that are not all 0"):
        ElasticBiSpikingNode().calibrate(torch.zeros(3))
