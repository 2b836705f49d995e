"""The decoder block: linears that share an encoding, and norm, gate and rotary fused with encoders."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from snnllm import shared_input
from snnllm.block import CACHE_ARGUMENT, device_bytes, prepare
from snnllm.config import SpikeConfig
from snnllm.decoding import DecodeSteps
from snnllm.execution import View, use_view
from snnllm.linear import SpikingLinear
from snnllm.model_state import ModelState
from snnllm.modeling import SpikingLlamaForCausalLM
from snnllm.pipelines.rotated import RotatedOptions, rotated_config
from snnllm.random_model import Shape, llama_config, random_dense, random_spiking

pytest.importorskip("triton", reason="needs triton (pip install triton)")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TINY = Shape(32, 48, 2, 1, 1, 64)
# The interpreter truncates to bfloat16, where devices round.
HALF = torch.bfloat16 if CUDA else torch.float16


def linears_of(model: Any) -> list[SpikingLinear]:
    return [m for m in model.modules() if isinstance(m, SpikingLinear)]


def make(dtype: torch.dtype = torch.float32, rotated: bool = True, **overrides: Any) -> Any:
    spike = SpikeConfig.preset("W4A4T2", **overrides)
    if rotated:
        spike = rotated_config(spike, RotatedOptions())
    model = random_spiking(llama_config(TINY, 64), spike, DEVICE, dtype)
    for linear in linears_of(model):
        linear.backend = "triton"
        linear.invalidate()
    return model


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run, in Triton's interpreter where there is no GPU."""
    monkeypatch.setattr(shared_input, "kernels_run_on", lambda device_type: True)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 64, (2, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.no_grad()
def logits_one_by_one(model: Any, ids: Tensor) -> Tensor:
    """Linears that somebody watches run one by one, each with its own encoding."""
    hooks = [m.register_forward_pre_hook(lambda *given: None) for m in linears_of(model)]
    logits: Tensor = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits


def one_by_one(layer: Any, x: Tensor) -> Tensor:
    """What q, k and v make of the normalised input, each with its own encoding."""
    normed = layer.input_layernorm(x)
    attention = layer.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    return torch.cat([linear(normed) for linear in linears], -1)


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("attention", "dtype"), [("float", HALF), ("encoded", torch.float32)])
def test_fused_is_one_by_one(ids, attention, dtype):
    model = make(dtype, attention=attention)
    layer = model.model.layers[0]
    assert layer.projections() is not None
    assert layer.gates() is not None
    assert layer.mlp.down() is not None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits_one_by_one(model, ids))


def with_offsets(model: Any) -> Any:
    """The model with offsets drawn anew, the same ones for linears of one input."""
    for linear in linears_of(model):
        if linear.layout.offset:
            generator = torch.Generator().manual_seed(0)
            sizes = (linear.in_features, linear.out_features)
            linear.set_offset(*(torch.randn(n, generator=generator) / 4 for n in sizes))
    return model


QUICK_RESIDUALS = [(0.1, True, torch.float32), (0.0, False, HALF)]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("ratio", "rotated", "dtype"),
    [  # half a minute each: the quick tests run two
        pytest.param(*case, marks=[] if case in QUICK_RESIDUALS else [pytest.mark.slow])
        for case in itertools.product((0.1, 0.0), (True, False), (torch.float32, HALF))
    ],
)
def test_the_residual_is_added_as_behind_the_mlp(monkeypatch, ids, dtype, rotated, ratio):
    overrides = {"attention": "float", "salient_ratio": ratio, "mask_scope": "input"}
    model = with_offsets(make(dtype, rotated, **overrides))
    given, gated = [], shared_input.SharedInput.gated
    monkeypatch.setattr(
        shared_input.SharedInput,
        "gated",
        lambda self, gate, up, residual=None: (
            given.append(residual is not None),
            gated(self, gate, up, residual),
        )[1],
    )
    layers, logits = model.model.layers, {}
    with torch.no_grad():
        logits["fused"] = model(ids).logits
        assert given == [True] * len(layers)
        for watched in ("mlp", "mlp.down_proj"):
            seen: list[Tensor] = []
            hooks = [
                layer.get_submodule(watched).register_forward_hook(
                    lambda module, args, out, seen=seen: seen.append(out)
                )
                for layer in layers
            ]
            given.clear()
            logits[watched] = model(ids).logits
            assert len(seen) == len(layers)
            assert not any(given)
            for hook in hooks:
                hook.remove()
    assert torch.equal(logits["mlp"], logits["fused"])
    assert torch.equal(logits["mlp.down_proj"], logits["fused"])


class Called(TorchDispatchMode):
    """Notes the operators of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_single_linear_takes_its_offset_in_the_encoder(dtype):
    layer = with_offsets(make(dtype, attention="float")).model.layers[0]
    linear = layer.self_attn.o_proj
    x = hidden(dtype)
    backend, prepared = linear.prepared()
    with torch.no_grad():
        expected = backend.linear(x.float() - linear.offset_input, prepared).to(dtype)
        with Called() as called:
            y = linear(x)
    assert torch.equal(y, expected)
    assert not {"aten::sub", "aten::_to_copy"} & set(called.names)
    with torch.no_grad(), use_view(layer, "unrolled"):
        assert torch.equal(linear(x), expected)


@pytest.mark.usefixtures("fused")
def test_views_and_backends_agree_where_kernels_run(ids):
    model = make(attention="float")
    with torch.no_grad():
        logits = model(ids).logits
        for linear in linears_of(model):
            linear.backend = "reference"
            linear.invalidate()
        assert model.model.layers[0].projections() is None
        assert torch.equal(model(ids).logits, logits)
        with use_view(model, "unrolled"):
            assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("attention", ["float", "encoded"])
def test_kernels_change_the_outputs_by_rounding_only(ids, monkeypatch, attention):
    model = make(attention=attention)
    for linear in linears_of(model):
        linear.backend = "reference"
    with torch.no_grad():
        logits = model(ids).logits
        monkeypatch.setattr(shared_input, "kernels_run_on", lambda device_type: True)
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fused")
def test_a_norm_keeps_the_gradient_of_whoever_wants_one():
    norm = make(attention="float").model.norm
    x = torch.randn(2, norm.weight.shape[0], dtype=norm.weight.dtype, device=DEVICE)
    x.requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not norm(x).requires_grad


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("part", ["mask", "clip", "offset", "backend", "bias", "view"])
def test_linears_that_encode_differently_run_one_by_one(part):
    layer = make(attention="float").model.layers[0]
    key = layer.self_attn.k_proj
    assert layer.projections() is not None
    if part == "mask":
        key.set_channel_group(key.encoder.channel_group.flip(0))
    elif part == "clip":
        key.encoder.clip.mul_(0.5)
        key.invalidate()
    elif part == "offset":
        key.get_buffer("offset_input").add_(1.0)
        key.invalidate()
    elif part == "bias":
        key.bias = torch.nn.Parameter(torch.ones(key.out_features, device=DEVICE))
        del key._buffers["offset_output"]
        layer.self_attn.q_proj._buffers.pop("offset_output")
        key.invalidate()
    elif part == "backend":
        key.backend = "reference"
    else:
        key.view = View.UNROLLED
    assert layer.projections() is None
    assert layer.gates() is not None


@pytest.mark.usefixtures("fused")
def test_a_changed_weight_is_packed_again():
    layer, x = make(attention="float").model.layers[0], hidden()
    before = layer.projections().normed(layer.input_layernorm, x)[0].outputs
    for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
        linear.weight_codes.zero_()
        linear.invalidate()
    after = layer.projections().normed(layer.input_layernorm, x)[0].outputs
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(layer, x))


@pytest.mark.usefixtures("fused")
def test_an_exchanged_linear_is_packed_again():
    layer, x = make(attention="float").model.layers[0], hidden()
    before = layer.projections().normed(layer.input_layernorm, x)[0].outputs
    other = make(attention="float").model.layers[0].self_attn.q_proj
    other.weight_codes.zero_()
    other.invalidate()
    layer.self_attn.q_proj.invalidate()  # as often as the other one
    layer.projections()
    layer.self_attn.q_proj = other
    after = layer.projections().normed(layer.input_layernorm, x)[0].outputs
    assert not torch.equal(before, after)
    assert torch.equal(after, one_by_one(layer, x))


@pytest.mark.usefixtures("fused")
def test_hooks_of_attention_and_mlp_see_hidden_states(ids):
    model = make(attention="float")
    layer, seen = model.model.layers[0], []
    with torch.no_grad():
        logits = model(ids).logits
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        assert torch.equal(model(ids).logits, logits)
    assert [tuple(x.shape) for x in seen] == [(2, 3, 32)] * 2


@pytest.mark.usefixtures("fused")
def test_replaced_forwards_are_called(ids):
    """Those of accelerate's hooks, too."""
    model = make(attention="float")
    layer, seen = model.model.layers[0], []
    with torch.no_grad():
        logits = model(ids).logits
        for part in (layer.mlp, layer.self_attn, layer.input_layernorm, layer.self_attn.o_proj):
            original = part.forward

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                seen.append(original.__self__)
                return original(*args, **kwargs)

            part.forward = counted
        assert torch.equal(model(ids).logits, logits)
    assert {type(part).__name__ for part in seen} == {
        *("SpikingLlamaMLP", "ProjectedAttention", "SpikingRMSNorm", "SpikingLinear")
    }
    assert len(seen) == 4


@pytest.mark.usefixtures("fused")
def test_copies_and_state_dicts_are_those_of_the_stored_codes(ids):
    model = make(attention="float")
    prepare(model)
    with torch.no_grad():
        logits = model(ids).logits
    other = copy.deepcopy(model)
    assert other.model.layers[0]._gates is None
    fresh = SpikingLlamaForCausalLM(model.config).to(DEVICE).eval()
    fresh.load_state_dict(model.state_dict())
    for linear in linears_of(fresh):
        linear.backend = "triton"
    with torch.no_grad():
        assert torch.equal(other(ids).logits, logits)
        assert torch.equal(fresh(ids).logits, logits)


@pytest.mark.usefixtures("fused")
def test_prepared_models_are_one_graph(ids):
    model = make(attention="float")
    prepare(model)
    caches = [StaticCache(config=model.config, max_cache_len=8) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        eager = model(ids, **{CACHE_ARGUMENT: caches[0]}).logits
        traced = compiled(ids, **{CACHE_ARGUMENT: caches[1]}).logits
    # While tracing, transformers chooses another kernel for attention in float.
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)


def test_on_a_cpu_transformers_own_forward_runs(ids, monkeypatch):
    if CUDA:
        pytest.skip("there is a GPU")
    model = make(attention="float")
    for linear in linears_of(model):
        linear.backend = "auto"
    called = []
    monkeypatch.setattr("snnllm.block.share_input", lambda linears: called.append(linears))
    with torch.no_grad():
        model(ids)
    assert not called


@pytest.mark.gpu
def test_a_gpu_holds_a_weight_once(ids):
    before = torch.cuda.memory_allocated()  # by other tests in this process
    model = random_spiking(
        llama_config(Shape(1024, 2816, 8, 8, 2, 64)),
        rotated_config(SpikeConfig.preset("W4A4T2"), RotatedOptions()),
        DEVICE,
        torch.bfloat16,
    )
    weights = sum(m.in_features * m.out_features for m in linears_of(model))
    others = sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        model(ids)
    assert all(m.weight_codes.device.type == "cpu" for m in linears_of(model))
    assert device_bytes(model) < others + 0.6 * weights
    assert torch.cuda.memory_allocated() - before < others + 0.7 * weights + 32e6


@pytest.mark.usefixtures("fused")
def test_packing_anew_for_another_backend_is_a_change():
    """Recorded passes read what was packed before; nobody generates in between."""
    model, state = make(attention="float"), ModelState()
    layer, linears = model.model.layers[0], linears_of(model)
    packed = layer.projections()
    assert packed is not None
    assert state.changed(model)
    assert layer.projections() is packed
    assert state.changed(model) is False
    backends = [linear.backend for linear in linears]
    for linear in linears:
        linear.backend = "reference"
    assert layer.projections() is None
    for linear, backend in zip(linears, backends, strict=True):
        linear.backend = backend
    assert layer.projections() is not packed
    assert state.changed(model)


@pytest.mark.usefixtures("fused")
def test_a_change_is_one_change():
    """What is recorded behind it is of use to the next generation."""
    model, steps = make(attention="float"), DecodeSteps()
    assert steps.ready(model)
    assert steps._state.changed(model) is False
    model.model.layers[0].self_attn.q_proj.invalidate()
    assert steps.ready(model)
    assert steps._state.changed(model) is False


def test_bytes_of_a_dense_model_are_those_of_its_parameters():
    model = random_dense(llama_config(TINY), torch.device("cpu"), torch.bfloat16)
    buffers = sum(b.nbytes for b in model.buffers())
    assert device_bytes(model) == sum(p.nbytes for p in model.parameters()) + buffers
