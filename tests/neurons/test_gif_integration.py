"""The nodes work with SpikingJelly's tools, with torch.compile, and in training."""

import copy
import io
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, layer, memopt, monitor, op_counter
from spikingjelly.activation_based.layer import SpikingSelfAttention
from torch import nn

from neurons import GIFNode, SignedGIFNode, SpikeEncoder

both = pytest.mark.parametrize("node_class", [GIFNode, SignedGIFNode])


def charges(*shape: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@both
def test_v_seq_holds_the_membrane_of_every_step(node_class):
    x_seq = charges(5, 4, 6)
    multi, single = node_class(4, step_mode="m"), node_class(4, store_v_seq=True)
    plain = multi(x_seq)
    multi.reset()
    multi.store_v_seq = True
    assert torch.equal(multi(x_seq), plain)
    spikes = torch.stack([single(x) for x in x_seq])
    assert multi.v_seq.dtype == torch.float32
    assert torch.equal(multi.v_seq, single.v_seq)
    assert torch.equal(multi.v_seq[-1], multi.v)
    charged = torch.cat([torch.full((1, 4, 6), multi.v_init), multi.v_seq[:-1]]) + x_seq
    assert torch.equal(charged - spikes, multi.v_seq)


@both
def test_monitors(node_class):
    net = nn.Sequential(nn.Linear(6, 6), node_class(4, step_mode="m", store_v_seq=True))
    with (
        monitor.OutputMonitor(net, node_class, lambda s: s.to(torch.int8)) as spikes,
        monitor.AttributeMonitor("v_seq", False, net, node_class) as membranes,
    ):
        out = net(charges(3, 4, 6))
        assert torch.equal(spikes["1"][0], out.to(torch.int8))
        assert torch.equal(membranes["1"][0], net[1].v_seq)


@both
def test_state_counter_sees_reads_and_writes(node_class):
    counter = op_counter.NeuronStateCounter()
    with torch.no_grad(), op_counter.DispatchCounterMode([counter]):
        nn.Sequential(node_class(4, step_mode="m"))(charges(3, 4, 6))
    counts = counter.get_metric_counts()["Global"]
    membrane = 3 * 4 * 6  # T steps of the neurons
    assert counts["state_adds"] == 2 * membrane  # charge and reset
    assert counts["state_writes"] >= membrane * 4
    assert counts["state_reads"] >= membrane * 4


@both
@pytest.mark.parametrize("mode", ["s", "m"])
def test_compile_fullgraph(node_class, mode):
    torch.compiler.reset()
    x = charges(3, 4, 6)
    kwargs = {"levels": 4, "step_mode": mode, "steps_per_channel": [1, 2, 3, 1, 2, 3]}
    node, eager = node_class(**kwargs), node_class(**kwargs)
    compiled = torch.compile(node, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), eager(x))
        assert torch.equal(node.v, eager.v)
        assert torch.equal(node.step, eager.step)


def test_compile_with_inductor():
    torch.compiler.reset()
    x = charges(2, 4, 6)
    node, eager = GIFNode(4, step_mode="m"), GIFNode(4, step_mode="m")
    with torch.no_grad():
        assert torch.equal(torch.compile(node, fullgraph=True)(x), eager(x))
    assert torch.equal(node.v, eager.v)


def test_compiled_gradient():
    torch.compiler.reset()
    x, weight = charges(2, 4, 6).requires_grad_(), charges(2, 4, 6, seed=1)
    node = GIFNode(4, step_mode="m")
    compiled = torch.compile(copy.deepcopy(node), fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad((f(x) * weight).sum(), x)[0] for f in (compiled, node)]
    assert torch.equal(*grads)


@both
def test_copies_keep_parameters_and_state(node_class):
    node = node_class(4, step_mode="m", steps_per_channel=[2])
    x_seq = charges(3, 4, 6)
    node(x_seq)
    buffer = io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(node),
        pickle.loads(pickle.dumps(node)),
        torch.load(buffer, weights_only=False),
    ]
    expected = node(x_seq)
    for twin in copies:
        assert torch.equal(twin(x_seq), expected)
        twin.load_state_dict(node.state_dict())


@both
def test_containers_and_set_step_mode(node_class):
    x_seq = charges(3, 4, 6)
    expected = node_class(4, step_mode="m")(x_seq)
    assert torch.equal(layer.MultiStepContainer(node_class(4))(x_seq), expected)
    container = layer.StepModeContainer(True, "m", node_class(4))
    assert torch.equal(container(x_seq), expected)
    net = nn.Sequential(layer.Linear(6, 6), node_class(4))
    functional.set_step_mode(net, "m")
    assert net[1].step_mode == "m"
    assert net(x_seq).shape == x_seq.shape
    assert torch.equal(functional.multi_step_forward(x_seq, node_class(4)), expected)


@both
def test_drop_in_spiking_neuron(node_class):
    attention = SpikingSelfAttention(8, 2, spiking_neuron=node_class, levels=4)
    assert any(isinstance(m, node_class) for m in attention.modules())
    out = attention(charges(2, 2, 8, 5))
    assert out.isfinite().all()


@both
def test_memopt_checkpoint(node_class):
    x_seq = charges(3, 4, 6).requires_grad_()
    net = nn.Sequential(nn.Linear(6, 6), node_class(4, step_mode="m"))
    (expected,) = torch.autograd.grad(net(x_seq).sum(), x_seq)
    functional.reset_net(net)
    (grad,) = torch.autograd.grad(memopt.checkpoint_module(net)(x_seq).sum(), x_seq)
    torch.testing.assert_close(grad, expected)


def test_binary_network_learns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), GIFNode(4, step_mode="m"), nn.Linear(16, 2))
    x, label = charges(2, 64, 6), (charges(2, 64, 6)[0, :, 0] > 0).long()
    optimizer, losses = torch.optim.Adam(net.parameters(), 0.02), []
    for _ in range(40):
        functional.reset_net(net)
        losses.append(nn.functional.cross_entropy(net(x).mean(0), label))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.gpu
@both
def test_cuda_equals_cpu(node_class):
    x_seq = charges(3, 40, 60)
    kwargs = {"levels": 4, "v_threshold": 0.3, "step_mode": "m", "steps_per_channel": [2]}
    node, twin = node_class(**kwargs), node_class(**kwargs).cuda()
    assert torch.equal(twin(x_seq.cuda()).cpu(), node(x_seq))
    assert torch.equal(twin.v.cpu(), node.v)


@pytest.mark.gpu
@pytest.mark.parametrize("value_range", ["split", "shared", "commensurate"])
def test_encoder_on_cuda_equals_cpu(value_range):
    group = (torch.arange(64) % 5 == 0).to(torch.uint8)
    encoder, x = SpikeEncoder(group, (1, 2), 4, value_range), charges(500, 64)
    expected = encoder.encode(x)
    encoder.cuda()
    for got in (encoder.encode(x.cuda()), encoder.encode_spikes(x.cuda())[1]):
        assert (got.multiple is None) == (expected.multiple is None)
        pairs = [pair for pair in zip(got, expected, strict=True) if pair[1] is not None]
        assert all(torch.equal(a.cpu(), b) for a, b in pairs)
