"""`TernaryLinear`: three views, the same integers; storage; a reference that never multiplies."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snnllm.additive import AdditiveWork, additive_sums, fixed_point
from snnllm.execution import View, use_view
from snnllm.kernels import ReferenceBackend, TritonBackend
from snnllm.layout import LinearLayout
from snnllm.linear import SpikingLinear
from snnllm.step_allocation import StepClass, classes_of
from snnllm.ternary import TernaryWeight, dequantize_ternary, ternary_gptq
from snnllm.ternary_linear import TernaryLinear
from snnllm.weights import round_to_nearest


def ternary(
    channels: int = 24,
    out: int = 10,
    *,
    bits: int = 16,
    steps: tuple[int, ...] = (1,),
    weight_steps: tuple[int, ...] = (1, 2, 5),
    group_size: int | None = 8,
    bias: bool = True,
    value_range: str = "split",
    seed: int = 0,
) -> tuple[TernaryLinear, TernaryWeight]:
    """A filled layer with random steps, saliency groups and weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, channels, generator=generator)
    chosen = torch.randint(len(weight_steps), (channels,), generator=generator)
    inputs = torch.randn(4 * channels, channels, generator=generator)
    trains = ternary_gptq(weight, inputs.T @ inputs, torch.tensor(weight_steps)[chosen], group_size)
    layout = LinearLayout(2, bits, steps, value_range, "steps", group_size, classes=trains.classes)
    module = TernaryLinear(channels, out, bias, layout, "layer")
    module.set_channel_group(
        torch.randint(len(steps), (channels,), generator=generator, dtype=torch.uint8)
    )
    module.set_weight(trains, torch.randn(out, generator=generator) if bias else None)
    return module.eval(), trains


def every_view(module: TernaryLinear, x: Tensor) -> dict[View, tuple[Tensor, Tensor]]:
    out = {}
    for view in View:
        with use_view(module, view):
            out[view] = module.accumulators(x), module(x)
    return out


def test_commensurate_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer: ternary weights have no commensurate inputs"):
        ternary(bits=4, steps=(1, 2), value_range="commensurate")


@pytest.mark.parametrize("group_size", [8, 128, None])
@pytest.mark.parametrize("weight_steps", [(1,), (2,), (1, 3), (1, 2, 5, 7), (20,)])
@pytest.mark.parametrize(
    ("bits", "steps", "value_range"),
    [
        (16, (1,), "split"),
        (4, (1,), "split"),
        (4, (1, 2), "split"),
        (4, (1, 2), "shared"),
        (8, (1,), "split"),
        (1, (3, 8), "split"),
    ],
)
def test_the_views_give_the_same_accumulators_bit_for_bit(
    bits: int,
    steps: tuple[int, ...],
    value_range: str,
    weight_steps: tuple[int, ...],
    group_size: int | None,
    tolerance: Any,
) -> None:
    module, trains = ternary(
        37,
        11,
        bits=bits,
        steps=steps,
        weight_steps=weight_steps,
        group_size=group_size,
        value_range=value_range,
    )
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(3))
    views = every_view(module, x)
    accumulators, outputs = zip(*views.values(), strict=True)
    for other in accumulators[1:]:
        assert torch.equal(accumulators[0].long(), other.long())
    assert torch.equal(views[View.BINARY][1], views[View.UNROLLED][1])
    if bits != 16:
        assert torch.equal(views[View.BINARY][1], views[View.COLLAPSED][1])
    weight = dequantize_ternary(trains, group_size)
    assert torch.equal(module.dequantized_weight(), weight)
    seen = x if bits == 16 else module.encoder.decode(module.encoder.encode(x))
    expected = torch.nn.functional.linear(seen, weight, module.bias)
    for y in outputs:
        torch.testing.assert_close(
            y, expected, rtol=tolerance.reordered_sum, atol=10 * tolerance.reordered_sum
        )


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10_000))
def test_integer_activations_are_summed_exactly(channels: int, out: int, seed: int) -> None:
    module, trains = ternary(channels, out, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (3, channels), generator=generator).float()
    accumulators, unit = module._float_sums(x)
    exact = accumulators.double() * unit.double()[None, :, None]
    levels = trains.levels.double()
    whole = torch.stack(
        [
            x[:, trains.order[s.start : s.stop]].double() @ levels[:, s.start : s.stop].T
            for s in module.spec().segments
        ]
    )
    assert torch.equal(exact, whole)


class Operators(TorchDispatchMode):
    """Names of all operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


MULTIPLY = ("mul", "mm", "bmm", "addmm", "baddbmm", "div", "linear", "matmul", "dot", "addcmul")


def multiplications(names: set[str]) -> set[str]:
    return {n for n in names if n.rstrip("_").lstrip("_") in MULTIPLY or "int_mm" in n}


def test_the_reference_never_multiplies() -> None:
    levels = torch.randint(-3, 4, (6, 20), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    activations = torch.randint(-9, 10, (4, 20), generator=torch.Generator().manual_seed(1))
    activations[0, :5] = 0
    work = AdditiveWork()
    with Operators() as seen:
        sums = additive_sums(activations, levels, [(0, 12), (12, 20)], work)
    assert "where" in seen.names
    assert "sum" in seen.names
    assert not multiplications(seen.names)
    for index, part in enumerate((slice(0, 12), slice(12, 20))):
        assert torch.equal(sums[index], activations[:, part] @ levels[:, part].long().T)
    heard = (activations != 0).long().sum(0)
    assert work.additions == int((levels.clamp(min=0).long() * heard).sum())
    assert work.subtractions == int((-levels.clamp(max=0).long() * heard).sum())
    assert work.synaptic_operations == work.additions + work.subtractions
    with Operators() as dense:
        _ = activations @ levels.long().T
    assert multiplications(dense.names)  # the check sees a multiplication where there is one


def test_the_reference_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = ternary()
    x = torch.randn(7, 24)
    with use_view(module, View.BINARY):
        whole = module(x)
        monkeypatch.setattr("snnllm.additive._ELEMENTS", 1)
        assert torch.equal(module(x), whole)


def test_a_layer_counts_its_work() -> None:
    module, trains = ternary()
    x = torch.randn(3, 24)
    module.additive_work = AdditiveWork()
    with use_view(module, View.BINARY):
        module(x)
    spikes = int(trains.levels.long().abs().sum())
    assert module.additive_work.synaptic_operations == 3 * spikes
    assert module.additive_work.scalings == 3 * trains.threshold.numel()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=8))
def test_fixed_point_is_as_exact_as_float32(values: list[float]) -> None:
    x = torch.tensor([values])
    integers, unit = fixed_point(x)
    assert int(integers.abs().max()) <= 1 << 24
    error = (integers.double() * unit.double().unsqueeze(1) - x.double()).abs().max()
    assert float(error) <= float(x.double().abs().max()) * 2.0**-24 or float(error) < 2.0**-120


def test_bad_input_names_the_layer() -> None:
    module, _ = ternary()
    with use_view(module, View.UNROLLED), pytest.raises(ValueError, match="layer: the input holds"):
        module(torch.full((1, 24), torch.nan))


def test_what_does_not_fit_is_refused() -> None:
    module, trains = ternary()
    weight = torch.randn(10, 24)
    with pytest.raises(TypeError, match="layer: expected a TernaryWeight"):
        module.set_weight(round_to_nearest(weight, 2))
    with pytest.raises(ValueError, match="layer: the weight has classes"):
        module.set_weight(trains._replace(classes=(StepClass(1, 24),)))
    with pytest.raises(
        ValueError, match="layer: weight_columns .* do not hold the 24 input channels"
    ):
        TernaryLinear(24, 10, False, LinearLayout(2, 16, (1,), "split", "steps", 8), "layer")


def test_the_state_survives_saving_and_changes_of_dtype() -> None:
    module, _ = ternary(bits=4, steps=(1, 2))
    x = torch.randn(3, 24)
    expected = module(x)
    other = TernaryLinear(24, 10, True, module.layout, "layer")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x), expected)
    half = copy.deepcopy(module).to(torch.bfloat16).float()
    assert torch.equal(half.threshold(), module.threshold())
    assert torch.equal(half.levels(), module.levels())
    assert "weight steps: T=1 on" in repr(module)


def test_one_step_takes_less_than_two_bits() -> None:
    module, _ = ternary(640, 64, weight_steps=(1,), group_size=128)
    state = {k: v for k, v in module.state_dict().items() if k.startswith("weight_")}
    stored = 8 * sum(v.numel() * v.element_size() for v in state.values()) / (640 * 64)
    assert stored == pytest.approx(1.6 + 16 / 128 + 16 / 64)
    assert module.weight_codes.shape[1] == 128


def test_it_is_a_spiking_linear_with_its_classes() -> None:
    module, trains = ternary()
    assert isinstance(module, SpikingLinear)
    assert classes_of(torch.tensor([5, 5, 1])) == (StepClass(1, 1), StepClass(5, 2))
    assert module.layout.classes == trains.classes


@pytest.mark.parametrize("weight_steps", [(1,), (1, 2, 5)])
def test_the_triton_kernels_serve_ternary_weights(weight_steps: tuple[int, ...]) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    reason = TritonBackend().available()
    if reason is not None:
        pytest.skip(f"triton kernels: {reason}")
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    module, _ = ternary(140, 9, bits=4, steps=(1, 2), weight_steps=weight_steps, group_size=64)
    module = module.to(device)
    x = torch.randn(2, 140, generator=torch.Generator().manual_seed(0)).to(device)
    reference, kernels = ReferenceBackend(), TritonBackend()
    expected, prepared = reference.prepare(module.spec()), kernels.prepare(module.spec())
    assert torch.equal(kernels.accumulate(x, prepared), reference.accumulate(x, expected))
    assert torch.equal(kernels.linear(x, prepared), reference.linear(x, expected))
    assert prepared.bits == (2 if weight_steps == (1,) else 4)


@pytest.mark.gpu
def test_on_a_gpu_it_computes_the_same() -> None:
    for bits, steps in ((16, (1,)), (4, (1, 2))):
        module, _ = ternary(200, 64, bits=bits, steps=steps, group_size=128)
        x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
        here = {view: module_sums(module, view, x) for view in View}
        module = module.to("cuda")
        for view in View:
            assert torch.equal(module_sums(module, view, x.cuda()).cpu(), here[view])


def module_sums(module: TernaryLinear, view: View, x: Tensor) -> Tensor:
    with use_view(module, view):
        return module.accumulators(x).long()
