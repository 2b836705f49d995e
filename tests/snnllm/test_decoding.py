"""Recorded steps of decoding: the tokens of transformers' own loop."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation import utils as generation
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from snnllm import decoding, modeling
from snnllm.config import SpikeConfig
from snnllm.decoding import DecodeSteps
from snnllm.execution import use_view
from snnllm.linear import SpikingLinear
from snnllm.pipelines.rotated import RotatedOptions, rotated_config
from snnllm.random_model import Shape, llama_config, random_spiking
from snnllm.views import View

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ATTENTIONS = ["float", "encoded"]


@pytest.fixture(scope="module", params=ATTENTIONS)
def model(request: pytest.FixtureRequest) -> Any:
    spike = SpikeConfig.preset("W4A4T2", attention=request.param)
    spike = rotated_config(spike, RotatedOptions())
    shape = Shape(32, 96, 4, 2, 2, 64)
    return random_spiking(llama_config(shape, 96), spike, DEVICE, torch.float32)


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    """Three prompts, two of them padded on the left."""
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :6] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate(model: Any, prompts: dict[str, Tensor], **options: Any) -> Tensor:
    """With a dynamic cache, unless another is asked for; None: the default of the model."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    if "past_key_values" not in options:
        options.setdefault("cache_implementation", "dynamic")
    with torch.no_grad():
        ids: Tensor = model.generate(**prompts, **options)
    return ids


@pytest.fixture
def recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Our loop runs on the CPU too, step by step; the calls of it are listed."""
    calls: list[Any] = []
    original = modeling.sample

    def listed(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))  # not the arguments, which would keep the cache in use
        return original(*args, **kwargs)

    monkeypatch.setattr(modeling, "sample", listed)
    if not CUDA:
        monkeypatch.setattr(modeling, "records_on", lambda device: True)
        collapsed = View.COLLAPSED
        monkeypatch.setattr(SpikingLinear, "runs_in_triton", lambda self: self.view is collapsed)
    return calls


def test_tokens_are_those_of_the_dynamic_cache(model, prompts, recorded):
    expected = generate(model, prompts)
    assert not recorded
    for _ in range(2):  # the second time with the buffers of the first
        assert torch.equal(generate(model, prompts, cache_implementation="static"), expected)
    assert len(recorded) == 2


DEFAULT: dict[str, Any] = {"cache_implementation": None}


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}])
def test_who_asks_for_no_cache_gets_recorded_steps(model, prompts, recorded, options):
    torch.manual_seed(0)
    expected = generate(model, prompts, **options)
    torch.manual_seed(0)
    assert torch.equal(generate(model, prompts, **DEFAULT, **options), expected)
    assert len(recorded) == 1


REASONS = "many memory hook beams scores uncached view another own chunks processor criterion"


@pytest.mark.parametrize("why", REASONS.split())
def test_who_asks_for_no_cache_gets_a_growing_one(model, prompts, recorded, monkeypatch, why):
    """Where steps are not recorded; with a static one transformers would compile."""
    options: dict[str, Any] = {}
    compiled: list[Any] = []
    monkeypatch.setattr(
        type(model), "get_compiled_call", lambda self, config: compiled.append(1) or self.__call__
    )
    with ExitStack() as stack:
        if why == "many":  # three prompts, a cache of 128 tokens for each
            monkeypatch.setattr(decoding, "MOST_TOKENS", 3 * 128 - 1)
        elif why == "memory":
            monkeypatch.setattr(decoding, "_has_memory", lambda model, tokens: False)
        elif why == "hook":
            stack.callback(model.model.norm.register_forward_hook(lambda *given: None).remove)
        elif why == "view":
            stack.enter_context(use_view(model, View.UNROLLED))
        elif why == "another":  # thread has the buffers
            monkeypatch.setattr(model, "_steps", DecodeSteps())
            stack.enter_context(model._steps.lock)
        else:
            options = {
                "beams": {"num_beams": 2},
                "scores": {"return_dict_in_generate": True},
                "uncached": {"use_cache": False},
                "own": {"past_key_values": DynamicCache(config=model.config)},
                "chunks": {"prefill_chunk_size": 4},
                # They would be called behind the end.
                "processor": {"logits_processor": [lambda ids, scores: scores]},
                "criterion": {"stopping_criteria": [lambda ids, scores, **kwargs: False]},
            }[why]
        found = generate(model, prompts, **DEFAULT, **options)
    assert not recorded
    assert not compiled
    if why == "own":
        assert options["past_key_values"].get_seq_length() == found.shape[1] - 1


def test_a_cache_takes_at_most_half_of_the_free_memory(model, monkeypatch):
    config = model.config
    size = 2 * 128 * config.num_key_value_heads * config.num_hidden_layers * config.head_dim * 4
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    for spare, fits in ((0, True), (-1, False)):
        free = 2 * size - 600 + spare
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert decoding._has_memory(model, 128) is fits


def test_another_view_leaves_what_is_recorded(model, prompts, recorded):
    generate(model, prompts, **STATIC)
    buffers = model._steps._buffers
    with use_view(model, View.UNROLLED):
        generate(model, prompts)
    generate(model, prompts, **STATIC)
    assert model._steps._buffers is buffers
    assert len(recorded) == 2


@pytest.mark.parametrize("new", [1, 2, 3])
def test_few_tokens(model, prompts, recorded, new):
    expected = generate(model, prompts, max_new_tokens=new)
    static = generate(model, prompts, max_new_tokens=new, cache_implementation="static")
    assert torch.equal(static, expected)
    assert recorded


def test_sampling_draws_the_same_tokens(model, prompts, recorded):
    drawn = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 8, "temperature": 0.7}
        drawn.append(generate(model, prompts, cache_implementation=cache, **options))
    assert torch.equal(*drawn)
    assert recorded


def test_sequences_end_at_their_own_end_tokens(model, prompts, recorded):
    free = generate(model, prompts, eos_token_id=64)  # which is none
    free = free[:, prompts["input_ids"].shape[1] :]
    ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 1])]
    expected = generate(model, prompts, eos_token_id=ends)
    assert expected.shape[1] < prompts["input_ids"].shape[1] + 8  # all end early
    static = generate(model, prompts, eos_token_id=ends, cache_implementation="static")
    assert torch.equal(static, expected)
    assert recorded


def test_every_end_is_where_transformers_ends(model, prompts, recorded):
    """One sequence, ended after each number of tokens, also with the last one."""
    one = {name: tensor[:1] for name, tensor in prompts.items()}
    free = generate(model, one)[0, one["input_ids"].shape[1] :].tolist()
    for end in dict.fromkeys(free):
        expected = generate(model, one, eos_token_id=end)
        static = generate(model, one, eos_token_id=end, cache_implementation="static")
        assert torch.equal(static, expected)
    assert recorded


@pytest.mark.parametrize("least", ["min_new_tokens", "min_length"])
def test_sequences_end_behind_a_least_length(model, prompts, recorded, least):
    """Some would end at once, and all do soon behind the least length, each where it will."""
    options = {"eos_token_id": list(range(30)), "max_new_tokens": 24}
    free = generate(model, prompts, **options)
    assert (free[:, 9:12] < 30).any()
    options[least] = 3 if least == "min_new_tokens" else 12
    expected = generate(model, prompts, **options)
    assert 9 + 3 < expected.shape[1] < 9 + 24
    assert not (expected[:, 9:12] < 30).any()
    assert not recorded
    for _ in range(2):  # the second time with the buffers of the first
        assert torch.equal(generate(model, prompts, **options, **STATIC), expected)
    one = {name: tensor[:1] for name, tensor in prompts.items()}
    heard = _Heard()
    ids = generate(model, one, **options, **STATIC, streamer=heard)
    assert torch.equal(ids, generate(model, one, **options))
    assert heard.tokens == ids[0].tolist()
    assert len(recorded) == 3


class _Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_every_token_once(model, prompts, recorded):
    one = {name: tensor[:1] for name, tensor in prompts.items()}
    free = generate(model, one)[0, one["input_ids"].shape[1] :].tolist()
    for options in ({}, {"eos_token_id": free[3]}):
        heard = _Heard()
        ids = generate(model, one, cache_implementation="static", streamer=heard, **options)
        assert heard.tokens == ids[0].tolist()
        assert heard.ended == 1
    assert recorded


def test_other_calls_go_to_transformers(model, prompts, recorded, monkeypatch):
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    static = {"cache_implementation": "static"}
    expected = generate(model, prompts)
    asked = generate(model, prompts, **static, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(asked.sequences, expected)
    for options in ({"disable_compile": True}, {"compile_config": CompileConfig()}):
        assert torch.equal(generate(model, prompts, **static, **options), expected)
    mine = StaticCache(config=model.config, max_cache_len=20)
    assert torch.equal(generate(model, prompts, past_key_values=mine), expected)
    beams = generate(model, prompts, num_beams=2)
    assert torch.equal(generate(model, prompts, num_beams=2, **static), beams)
    assert not recorded


@pytest.mark.parametrize("length", [5, 9])
def test_prompts_longer_than_the_sequences_go_to_transformers(model, prompts, recorded, length):
    """With a criterion of one's own, which nobody checks."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
    expected = generate(model, prompts, stopping_criteria=criteria)
    asked = generate(model, prompts, stopping_criteria=criteria, cache_implementation=None)
    assert torch.equal(asked, expected)
    assert not recorded


def test_integers_of_prompts_do_not_show(model, prompts, recorded):
    shorter = {**prompts, "input_ids": prompts["input_ids"].int()}
    out = generate(model, shorter, cache_implementation="static")
    assert out.dtype == torch.int64
    assert torch.equal(out, generate(model, prompts))
    assert recorded


def test_a_cache_in_use_keeps_its_buffers(model, prompts):
    steps = DecodeSteps()
    positions = prompts["attention_mask"].sum(1, keepdim=True)
    first, second = (StaticCache(config=model.config, max_cache_len=20) for _ in range(2))
    steps.begin(first, prompts["attention_mask"], positions, torch.float32)
    steps.begin(second, prompts["attention_mask"], positions, torch.float32)
    assert steps.ready(model) is CUDA
    assert first.layers[0] is not second.layers[0]


STATIC = {"cache_implementation": "static"}


def test_hooks_are_called_at_every_step(model, prompts, recorded, monkeypatch):
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    expected = generate(model, prompts, **STATIC)
    seen: list[int] = []
    hook = model.model.norm.register_forward_hook(lambda *given: seen.append(1))
    watched = generate(model, prompts, **STATIC)
    hook.remove()
    assert torch.equal(watched, expected)
    assert len(seen) == 8
    assert len(recorded) == 1
    with torch.no_grad():  # transformers leaves hooks of its own
        model(**prompts, output_hidden_states=True)
    assert torch.equal(generate(model, prompts, **STATIC), expected)
    assert len(recorded) == 2


def test_recorded_neurons_run_at_every_step(model, prompts, recorded, monkeypatch):
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    node = model.model.layers[0].mlp.up_proj.encoder.node
    monkeypatch.setattr(node, "store_v_seq", True)
    generate(model, prompts, **STATIC)
    assert not recorded


def test_a_generation_within_another_has_its_own_buffers(model, prompts, recorded, monkeypatch):
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    expected = generate(model, prompts)
    inner: list[Tensor] = []

    def nested(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == prompts["input_ids"].shape[1] + 4:
            inner.append(generate(model, prompts, **STATIC))
        return scores

    outer = generate(model, prompts, **STATIC, logits_processor=[nested])
    assert torch.equal(outer, expected)
    assert torch.equal(*inner, expected)
    assert len(recorded) == 1


def test_attention_with_masks_of_its_own_goes_to_transformers(
    model, prompts, recorded, monkeypatch
):
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    monkeypatch.setattr(modeling, "_MASKED", ())
    expected = generate(model, prompts)
    assert torch.equal(generate(model, prompts, **STATIC), expected)
    assert not recorded


@pytest.mark.gpu
def test_offloaded_caches_go_to_transformers(model, prompts, recorded, monkeypatch):
    # Not compiled: torch 2.11 dies in torch._dynamo of the stream on which such a cache is prefetched.
    # (`disable_compile` would go to transformers by itself.)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    offloaded = generate(model, prompts, cache_implementation="offloaded_static")
    expected = generate(model, prompts)
    # Other kernels attend to a cache of another size: a rounding may turn random logits.
    assert offloaded.shape == expected.shape
    assert not recorded


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_without_a_gpu_are_refused(model, prompts, recorded, monkeypatch, cache):
    # A CUDA build of torch would tell of its driver, another that it was not compiled with CUDA.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"'{cache}' .* no such GPU.* 'dynamic' or 'static'"):
        generate(model, prompts, cache_implementation=cache)
    assert not recorded


def test_training_and_autocast_go_to_transformers(model, prompts, recorded, monkeypatch):
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        generate(model, prompts, **STATIC)
    model.train()
    generate(model, prompts, **STATIC)
    model.eval()
    assert not recorded


def test_a_model_that_generated_is_freed_with_its_last_name(model, prompts, recorded):
    copied = copy.deepcopy(model)
    assert torch.equal(generate(copied, prompts, **STATIC), generate(model, prompts, **STATIC))
    assert len(recorded) == 2
    gone = weakref.ref(copied)
    recorded.clear()
    gc.disable()  # memory of a GPU is back at once, not when cycles are looked for
    try:
        del copied
        assert gone() is None
    finally:
        gc.enable()


def test_a_model_that_moves_leaves_no_recorded_steps_behind(model, prompts, recorded):
    copied = copy.deepcopy(model)
    generate(copied, prompts, **STATIC)
    assert copied._steps is not None
    copied.to(DEVICE)
    assert copied._steps is None


@pytest.mark.gpu
def test_prompts_on_the_cpu_go_to_transformers(model, prompts, recorded, monkeypatch):
    if not hasattr(generation, "move_to_device"):
        pytest.skip("this transformers moves no inputs")
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: self.__call__)
    given = {name: tensor.cpu() for name, tensor in prompts.items()}
    assert torch.equal(generate(model, given, **STATIC), generate(model, prompts).cpu())
    assert not recorded


@pytest.mark.gpu
def test_steps_are_recorded_on_the_device_of_the_model(prompts):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spike = rotated_config(SpikeConfig.preset("W4A4T2", attention="float"), RotatedOptions())
    shape = llama_config(Shape(32, 96, 4, 2, 2, 64), 96)
    second = random_spiking(shape, spike, torch.device("cuda", 1), torch.float32)
    given = {name: tensor.to("cuda:1") for name, tensor in prompts.items()}
    expected = generate(second, given)
    assert torch.equal(generate(second, given, **STATIC), expected)


def test_compiled_calls_need_kernels_that_are_operators(model):
    if CUDA:
        pytest.skip("there is a GPU")
    assert model.get_compiled_call(None) == model.__call__


@pytest.mark.gpu
def test_a_step_is_recorded_and_used_again(model, prompts):
    generate(model, prompts, cache_implementation="static")
    step = model._steps._buffers.step
    assert step is not None
    generate(model, prompts, cache_implementation="static")
    assert model._steps._buffers.step is step
    model.model.layers[0].mlp.down_proj.invalidate()
    generate(model, prompts, cache_implementation="static")
    assert model._steps._buffers.step not in (None, step)
