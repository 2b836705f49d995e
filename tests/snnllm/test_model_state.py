"""What makes recorded passes of a model stale, or forbids them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from snnllm.config import SpikeConfig
from snnllm.execution import View, set_view
from snnllm.linear import SpikingLinear
from snnllm.model_state import ModelState
from snnllm.random_model import Shape, llama_config, random_spiking
from snnllm.shared_input import hooked


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    def runs_in_triton(self: SpikingLinear) -> bool:
        return self.view is View.COLLAPSED and self.backend != "another"

    monkeypatch.setattr(SpikingLinear, "runs_in_triton", runs_in_triton)
    spike = SpikeConfig.preset("W4A4T2", attention="encoded")
    shape = llama_config(Shape(32, 96, 4, 2, 2, 64), 96)
    return random_spiking(shape, spike, torch.device("cpu"), torch.float32)


def block(model: Any) -> Any:
    return model.model.layers[1]


def replace_norm(model: Any) -> None:
    block(model).input_layernorm = copy.deepcopy(block(model).input_layernorm)


def replace_linear(model: Any) -> None:
    block(model).mlp.up_proj = copy.deepcopy(block(model).mlp.up_proj)


def replace_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def replace_data(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data.clone()


def change_dtype(model: Any) -> None:
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.bfloat16()


def add_bias(model: Any) -> None:
    model.lm_head.register_parameter("bias", nn.Parameter(torch.zeros(64)))


def invalidate(model: Any) -> None:
    block(model).self_attn.o_proj.invalidate()


def change_backend(model: Any) -> None:
    block(model).self_attn.q_proj.backend = "reference"


def change_attention_view(model: Any) -> None:
    block(model).self_attn.view = View.UNROLLED


def change_attention(model: Any) -> None:
    model.config._attn_implementation = "eager"


def change_channel_groups(model: Any) -> None:
    attention = block(model).self_attn
    groups = attention.k_encoder.channel_group
    attention.set_channel_groups(groups.flip(-1), attention.v_encoder.channel_group)


def add_module(model: Any) -> None:
    block(model).extra = nn.Identity()


def remove_block(model: Any) -> None:
    del model.model.layers[0]


def replace_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


CHANGES = [
    replace_buffer,
    *(replace_norm, replace_linear, replace_parameter, replace_data, change_dtype, add_bias),
    *(
        invalidate,
        change_backend,
        change_attention_view,
        change_attention,
        change_channel_groups,
        add_module,
        remove_block,
    ),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed_once(model: Any, change: Callable[[Any], None]) -> None:
    state = ModelState()
    assert [state.changed(model) for _ in range(3)] == [True, False, False]
    change(model)
    assert [state.changed(model) for _ in range(2)] == [True, False]


def test_weights_changed_in_place_are_those_of_the_graph(model: Any) -> None:
    state = ModelState()
    state.changed(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert state.changed(model) is False


def watch(*args: Any) -> None:
    """A hook that only looks."""


def patch(module: nn.Module) -> Callable[[], None]:
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)  # type: ignore[method-assign]
    return partial(delattr, module, "forward")


def accelerate_hook(module: nn.Module) -> Callable[[], Any]:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())
    return partial(hooks.remove_hook_from_module, module)  # which leaves the method in the instance


WATCHERS = {
    "hook": lambda model: block(model).mlp.register_forward_hook(watch).remove,
    "pre-hook": lambda model: block(model).register_forward_pre_hook(watch).remove,
    "hook of the model": lambda model: model.register_forward_hook(watch).remove,
    "hook of a neuron": lambda model: (
        block(model).mlp.up_proj.encoder.node.register_forward_hook(watch).remove
    ),
    "patch": lambda model: patch(block(model).mlp),
    "accelerate": lambda model: accelerate_hook(block(model).self_attn),
    "hook of everything": lambda model: register_module_forward_hook(watch).remove,
    "pre-hook of everything": lambda model: register_module_forward_pre_hook(watch).remove,
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_hooks_forbid_recordings_as_long_as_they_are_there(model: Any, watcher: str) -> None:
    state = ModelState()
    state.changed(model)
    remove = WATCHERS[watcher](model)
    assert [state.changed(model) for _ in range(2)] == [None, None]
    remove()
    assert state.changed(model) is False


@pytest.mark.parametrize("operand", ["mlp.down_proj.encoder", "self_attn.v_encoder"])
def test_recorded_neurons_forbid_recordings(model: Any, operand: str) -> None:
    state, encoder = ModelState(), block(model).get_submodule(operand)
    state.changed(model)
    encoder.node.store_v_seq = True
    assert state.changed(model) is None
    encoder.node.store_v_seq = False
    assert state.changed(model) is False
    encoder.encode = encoder.encode
    assert state.changed(model) is None


def test_other_views_cannot_be_recorded_and_change_nothing(model: Any) -> None:
    state = ModelState()
    state.changed(model)
    set_view(model, View.UNROLLED)
    assert [state.changed(model) for _ in range(2)] == [None, None]
    set_view(model, View.COLLAPSED)
    assert state.changed(model) is False


def test_another_backend_in_between_is_a_change(model: Any) -> None:
    """It packs other weights in the place of those that were recorded."""
    state = ModelState()
    state.changed(model)
    linear = next(m for m in model.modules() if isinstance(m, SpikingLinear))
    before = linear.backend
    linear.backend = "another"
    assert state.changed(model) is None
    linear.backend = before
    assert state.changed(model) is True


def test_a_model_without_spiking_linears_cannot_be_recorded() -> None:
    dense = nn.Sequential(nn.Linear(2, 2))
    dense.config = type("Config", (), {"_attn_implementation": "sdpa"})()
    assert ModelState().changed(dense) is None


def test_the_state_keeps_no_model_alive(model: Any) -> None:
    copied = copy.deepcopy(model)
    copied.state, gone = ModelState(), weakref.ref(copied)
    copied.state.changed(copied)
    gc.disable()
    try:
        del copied
        assert gone() is None
    finally:
        gc.enable()


def test_hooks_of_all_modules_keep_them_from_being_packed() -> None:
    linear = torch.nn.Linear(1, 1)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert hooked(linear)
    finally:
        handle.remove()
    assert not hooked(linear)
