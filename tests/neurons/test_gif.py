"""The nodes keep the contract of SpikingJelly 2.0's own nodes, and their own equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import base, functional, neuron
from spikingjelly.activation_based.distributed.llm import temporal
from torch import nn

from neurons import GIFNode, GIFSpikeCount, SignedGIFNode, SignedSpikeCount
from neurons import functional as core

both = pytest.mark.parametrize("node_class", [GIFNode, SignedGIFNode])
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def charges(*shape: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---- dynamics


@settings(max_examples=40, deadline=None, derandomize=True)
@given(levels=st.sampled_from([2, 3, 16]), steps=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_node_is_the_functional_loop_and_the_closed_form(levels, steps, seed):
    charge = charges(4, 8, seed=seed, scale=levels * steps)
    x_seq = torch.cat([charge[None], torch.zeros(steps - 1, 4, 8)])
    node, signed = GIFNode(levels, step_mode="m"), SignedGIFNode(levels, step_mode="m")
    spikes, v = core.gif_multi_step(x_seq, torch.full((4, 8), 0.5), levels)
    assert torch.equal(node(x_seq), spikes)
    assert torch.equal(node.v, v)
    assert torch.equal(spikes.sum(0), core.gif_count(charge, 0.5, steps * (levels - 1)))
    spikes, v = core.signed_gif_multi_step(x_seq, torch.zeros(4, 8), levels)
    assert torch.equal(signed(x_seq), spikes)
    assert torch.equal(signed.v, v)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(v_init=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 2**16))
def test_two_levels_are_the_integrate_and_fire_node(v_init, seed):
    """Dyadic charges and threshold: SpikingJelly's reset in real units is exact there too."""
    x_seq = (charges(8, 3, 5, seed=seed) * 16).round() / 16
    node = GIFNode(2, v_threshold=2.0, v_init=v_init, step_mode="m", store_v_seq=True)
    reference = neuron.IFNode(v_threshold=2.0, v_reset=None, step_mode="m", store_v_seq=True)
    reference.v = torch.full((3, 5), 2.0 * v_init)
    assert torch.equal(node(x_seq), reference(x_seq))
    assert torch.equal(node.v_seq * 2.0, reference.v_seq)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16))
def test_signed_two_levels_are_the_ternary_node_but_for_the_rounding_offset(seed):
    """A ternary node fires at |h| >= theta, ours at |h| > 1/2: equal for theta off the grid."""
    x_seq = (charges(8, 3, 5, seed=seed, scale=1.0) * 16).round() / 16
    node = SignedGIFNode(2, step_mode="s", store_v_seq=True)
    ternary = neuron.TernaryIFNode(v_threshold=0.5 + 1 / 32, v_reset=None)
    for x in x_seq:
        # The ternary node resets by its threshold, ours by 1: hand it our membrane every step.
        ternary.v = torch.zeros_like(x) if isinstance(node.v, float) else node.v.clone()
        assert torch.equal(node(x), ternary(x))


def test_signed_count_is_the_ternary_count_shifted_by_half():
    """sum(ternary) truncates; sum(signed) rounds: equal after moving the charge by 1/2."""
    magnitude = (charges(200, scale=3.0).abs() * 16).round() / 16 + 1 / 32  # no ties
    charge = magnitude * torch.where(charges(200, seed=1) < 0, -1.0, 1.0)
    shifted = torch.sign(charge) * (charge.abs() + 0.5)
    zeros = torch.zeros(19, 200)
    signed = SignedGIFNode(2, step_mode="m")(torch.cat([charge[None], zeros]))
    ternary = neuron.TernaryIFNode(v_reset=None, step_mode="m")(torch.cat([shifted[None], zeros]))
    assert torch.equal(signed.sum(0), ternary.sum(0))


@both
def test_threshold_scales_the_input(node_class):
    x_seq = charges(3, 4, 6)
    spikes = node_class(4, v_threshold=0.25, step_mode="m")(x_seq * 0.25)
    assert torch.equal(spikes, node_class(4, step_mode="m")(x_seq))
    assert node_class(4, v_threshold=2).v_threshold == 2.0


# ---- state: modes, chunks, reset, shapes, functional forwards


@both
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("steps_per_channel", [None, [1, 2, 3, 4, 5, 6]])
def test_single_step_equals_multi_step(node_class, detach_reset, steps_per_channel):
    x_seq = charges(5, 4, 6).requires_grad_()
    kwargs = {"levels": 4, "detach_reset": detach_reset, "steps_per_channel": steps_per_channel}
    single, multi = node_class(**kwargs), node_class(**kwargs, step_mode="m")
    out_s, out_m = torch.stack([single(x) for x in x_seq]), multi(x_seq)
    assert torch.equal(out_s, out_m)
    assert torch.equal(single.v, multi.v)
    assert torch.equal(single.step, multi.step)
    weight = charges(5, 4, 6, seed=1)
    (grad_s,) = torch.autograd.grad((out_s * weight).sum(), x_seq)
    (grad_m,) = torch.autograd.grad((out_m * weight).sum(), x_seq)
    assert torch.equal(grad_s, grad_m)
    assert grad_m.isfinite().all()
    assert grad_m.any()


@both
def test_detach_reset_changes_the_gradient_only(node_class):
    x_seq = charges(5, 4, 6).requires_grad_()
    attached = node_class(4, step_mode="m")(x_seq)
    detached = node_class(4, step_mode="m", detach_reset=True)(x_seq)
    assert torch.equal(attached, detached)
    grads = [torch.autograd.grad(y.sum(), x_seq)[0] for y in (attached, detached)]
    assert not torch.equal(*grads)


@both
def test_chunks_equal_whole(node_class):
    x_seq, steps = charges(6, 2, 3), [1, 3, 5]
    whole = node_class(4, step_mode="m", steps_per_channel=steps)
    parts = node_class(4, step_mode="m", steps_per_channel=steps)
    expected = whole(x_seq)
    assert torch.equal(torch.cat([parts(x_seq[:2]), parts(x_seq[2:3]), parts(x_seq[3:])]), expected)
    assert torch.equal(parts.v, whole.v)
    assert torch.equal(
        functional.chunk_multi_step_forward(
            2, x_seq, node_class(4, step_mode="m", steps_per_channel=steps)
        ),
        expected,
    )


@both
def test_channel_with_one_step_fires_in_the_first_step_only(node_class):
    x_seq = torch.full((3, 2, 2), 3.0)
    node = node_class(4, step_mode="m", steps_per_channel=torch.tensor([1, 2]))
    expected = torch.tensor([[3.0, 3.0], [0.0, 3.0], [0.0, 0.0]])
    assert torch.equal(node(x_seq), expected[:, None].expand(3, 2, 2))
    assert node.step == 3
    assert not node(x_seq).any()
    node.reset()
    assert node(x_seq)[0].all()


def test_steps_per_channel_of_an_image_and_of_heads():
    conv = GIFNode(4, step_mode="m", steps_per_channel=torch.tensor([1, 2]).view(2, 1, 1))
    spikes = conv(torch.full((2, 3, 2, 4, 4), 3.0))
    assert not spikes[1, :, 0].any()
    assert spikes[1, :, 1].all()
    heads = GIFNode(4, step_mode="m", steps_per_channel=torch.tensor([[[1, 2]], [[2, 1]]]))
    spikes = heads(torch.full((2, 1, 2, 3, 2), 3.0))
    assert spikes[1, 0, :, 0].bool().tolist() == [[False, True], [True, False]]


@both
def test_reset_replays_and_other_shapes_start_anew(node_class):
    node = node_class(4, step_mode="m", steps_per_channel=[2])
    x_seq = charges(3, 4, 6)
    first, end = node(x_seq), node.v
    node.reset()
    assert node.v == node.v_init
    assert node.step == 0.0
    assert torch.equal(node(x_seq), first)
    assert torch.equal(node.v, end)
    fresh = node_class(4, step_mode="m", steps_per_channel=[2])
    assert torch.equal(node(x_seq[:, :2]), fresh(x_seq[:, :2]))
    assert torch.equal(node.step, fresh.step)


@both
def test_reset_net_and_detach_net(node_class):
    node = node_class(4, step_mode="m", store_v_seq=True)
    net = nn.Sequential(nn.Linear(6, 6), node)
    net(charges(3, 4, 6))
    assert node.v.requires_grad
    functional.detach_net(net)
    assert not node.v.requires_grad
    assert not node.v_seq.requires_grad
    functional.reset_net(net)
    assert node.v == node.v_init
    assert node.v_seq is None


@both
def test_memories_are_outside_the_state_dict_and_extract_and_load(node_class):
    node = node_class(4, step_mode="m", steps_per_channel=[2])
    assert isinstance(node, (neuron.BaseNode, base.MemoryModule))
    assert [name for name, _ in base.named_memories(node)] == ["v", "step"]
    x_seq = charges(3, 4, 6)
    node(x_seq)
    assert not node.state_dict()
    saved = [m.clone() for m in base.extract_memories(node)]
    again = node(x_seq)
    base.load_memories(node, saved)
    assert torch.equal(node(x_seq), again)


@both
def test_functional_forward_is_pure_and_equals_forward(node_class):
    x_seq = charges(3, 4, 6)
    for mode, x in (("s", x_seq[0]), ("m", x_seq)):
        node = node_class(4, step_mode=mode, steps_per_channel=[2])
        sentinels = (node.v_init, 0.0)
        states = node.materialize_states((x,), sentinels, mode)
        copies = [s.clone() for s in states]
        (out,), new = node.functional_forward((x,), states)
        assert (node.v, node.step) == sentinels
        assert all(torch.equal(a, b) for a, b in zip(states, copies, strict=True))
        assert torch.equal(node(x), out)
        assert torch.equal(node.v, new[0])
        assert torch.equal(node.step, new[1])


@both
def test_to_functional_forward(node_class):
    x_seq = charges(3, 4, 6)
    node = node_class(4, step_mode="m", steps_per_channel=[2])
    net = nn.Sequential(node, nn.Linear(6, 6), node_class(2, step_mode="m"))
    for module in (node, net):
        states = tuple(base.extract_memories(module))
        (out,), new = base.to_functional_forward(module)((x_seq,), states)
        assert tuple(base.extract_memories(module)) == states
        assert torch.equal(module(x_seq), out)
        stored = base.extract_memories(module)
        assert all(torch.equal(a, b) for a, b in zip(new, stored, strict=True))
        functional.reset_net(net)
    with pytest.raises(ValueError, match="state"):
        base.to_functional_forward(net)((x_seq,), (0.5,))


@both
def test_run_functional_sequence_restarts(node_class):
    node, x_seq = node_class(4, step_mode="m"), charges(3, 4, 6)
    first = node(x_seq)
    membrane = node.v
    (out,) = temporal.run_functional_sequence(node, (x_seq,))
    assert torch.equal(out, first)
    assert node.v is membrane


@both
def test_gradient_to_the_initial_state(node_class):
    v = torch.full((4, 6), 0.25, requires_grad=True)
    x_seq = charges(3, 4, 6)
    for mode in ("s", "m"):
        node = node_class(4, step_mode=mode)
        node.v = v
        out = node(x_seq) if mode == "m" else node(x_seq[0])
        (grad,) = torch.autograd.grad(out.sum() + node.v.sum(), v)
        assert grad.isfinite().all()
        assert grad.any()


@both
def test_samples_are_independent(node_class):
    x_seq = charges(3, 4, 6)
    whole = node_class(4, step_mode="m")(x_seq)
    single = [node_class(4, step_mode="m")(x_seq[:, i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(single, 1), whole)


# ---- shapes, dtypes, devices


@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_membrane_is_float32_and_output_in_the_input_dtype(node_class, dtype):
    x_seq = charges(3, 4, 6).to(dtype).requires_grad_()
    node, reference = node_class(4, step_mode="m"), node_class(4, step_mode="m")
    out = node(x_seq)
    assert out.dtype == dtype
    assert node.v.dtype == torch.float32
    assert torch.equal(out.float(), reference(x_seq.float()))
    assert torch.equal(node.v, reference.v)
    out.sum().backward()
    assert x_seq.grad.isfinite().all()


@both
def test_to_keeps_the_state_usable(node_class):
    x_seq = charges(3, 4, 6)
    node = node_class(4, step_mode="m", steps_per_channel=[2])
    node(x_seq)
    node.to(torch.bfloat16)
    assert node.step.dtype == node.steps_per_channel.dtype == torch.int32
    assert node(x_seq.bfloat16()).dtype == torch.bfloat16
    assert node.v.dtype == torch.float32


@both
def test_non_contiguous_empty_and_scalar_inputs(node_class):
    x_seq = charges(6, 4, 3).transpose(0, 2)
    contiguous = node_class(4, step_mode="m")(x_seq.contiguous())
    assert torch.equal(node_class(4, step_mode="m")(x_seq), contiguous)
    assert node_class(4, step_mode="m")(torch.zeros(2, 0, 5)).shape == (2, 0, 5)
    assert node_class(4)(torch.tensor(2.75)) in (2.0, 3.0)


@both
def test_meta_device(node_class):
    with torch.device("meta"):
        node = node_class(4, step_mode="m", steps_per_channel=[1, 2])
        assert node(torch.zeros(2, 3, 2)).shape == (2, 3, 2)


# ---- arguments


@both
def test_repr(node_class):
    text = repr(node_class(4, steps_per_channel=[1, 2]))
    for part in ("levels=4", "v_threshold=1.0", "step_mode=s", "steps_per_channel=(2,)"):
        assert part in text


@both
def test_own_surrogate(node_class):
    surrogate_class = GIFSpikeCount if node_class is GIFNode else SignedSpikeCount
    wide = surrogate_class(3, grad_window=(-100.0, 100.0))
    x = torch.full((2,), 50.0, requires_grad=True)
    node = node_class(4, surrogate_function=wide)
    (grad,) = torch.autograd.grad(node(x).sum(), x)
    assert grad.tolist() == [1, 1]
    wide.set_spiking_mode(False)
    assert node_class(4, surrogate_function=wide)(torch.tensor([1.25])).tolist() == [1.25]


@both
@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"levels": 4.0}, TypeError, "levels must be an int, got float"),
        ({"levels": True}, TypeError, "levels must be an int, got bool"),
        ({"levels": 1}, ValueError, "levels must be at least 2"),
        ({"v_threshold": "1"}, TypeError, "v_threshold must be a float, got str"),
        ({"v_threshold": 0.0}, ValueError, "v_threshold must be positive and finite"),
        ({"v_threshold": float("nan")}, ValueError, "v_threshold must be positive and finite"),
        ({"v_init": None}, TypeError, "v_init must be a float, got NoneType"),
        ({"detach_reset": 1}, TypeError, "detach_reset must be a bool, got int"),
        ({"step_mode": "x"}, ValueError, "step_mode"),
        ({"steps_per_channel": [1.5]}, TypeError, "steps_per_channel must hold integers"),
        ({"steps_per_channel": [True]}, TypeError, "steps_per_channel must hold integers"),
        ({"steps_per_channel": [1, 0]}, ValueError, "steps >= 1"),
        (
            {"steps_per_channel": torch.zeros(0, dtype=torch.int32)},
            ValueError,
            "at least one channel",
        ),
        (
            {"surrogate_function": neuron.IFNode().surrogate_function},
            ValueError,
            "surrogate_function must map the charged membrane",
        ),
        (
            {"surrogate_function": GIFSpikeCount(4)},
            ValueError,
            "with max_spike_count = 15",
        ),
    ],
)
def test_bad_arguments(node_class, kwargs, error, match):
    with pytest.raises(error, match=match):
        node_class(**kwargs)


@both
def test_bad_inputs(node_class):
    with pytest.raises(TypeError, match=r"expects a floating-point charge, got torch\.int64"):
        node_class(4)(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one time step"):
        node_class(4, step_mode="m")(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 cannot hold spikes of 512 levels"):
        node_class(512)(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must broadcast to the trailing dimensions"):
        node_class(4, steps_per_channel=[1, 2])(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="must broadcast to the trailing dimensions"):
        node_class(4, steps_per_channel=[1, 2])(torch.zeros(4, 3))
