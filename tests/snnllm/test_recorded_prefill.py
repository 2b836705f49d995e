"""Recorded prefills: the tokens of transformers' own, for prompts of one padded length and of several."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from snnllm import decoding, modeling, recording
from snnllm.config import SpikeConfig
from snnllm.decoding import DecodeSteps
from snnllm.linear import SpikingLinear
from snnllm.pipelines.rotated import RotatedOptions, rotated_config
from snnllm.random_model import Shape, llama_config, random_spiking
from snnllm.recording import Recording, padded_length

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STATIC = {"cache_implementation": "static"}
PREFILL, STEP = "_run_prompts", "_run_step"


def make_model(attention: str) -> Any:
    spike = rotated_config(SpikeConfig.preset("W4A4T2", attention=attention), RotatedOptions())
    shape = llama_config(Shape(32, 96, 4, 2, 2, 64), 512)
    return random_spiking(shape, spike, DEVICE, torch.float32)


@pytest.fixture(params=["float", "encoded"])
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is replayed, call by call; on a CPU a replay runs the recorded work again, on its buffers."""
    replays: list[str] = []

    class Listed(Recording):
        def __init__(self, work: Any, beside: Any = None) -> None:
            self._name = work.func.__name__
            self._listed_work, self._listed_at = None if CUDA else work, places(work)
            if CUDA:
                super().__init__(work, beside)

        def replay(self) -> Tensor:
            replays.append(self._name)
            if self._listed_work is None:
                return super().replay()
            assert places(self._listed_work) == self._listed_at
            return self._listed_work()

    monkeypatch.setattr(decoding, "Recording", Listed)
    if not CUDA:
        monkeypatch.setattr(modeling, "records_on", lambda device: True)
        monkeypatch.setattr(decoding, "records_on", lambda device: True)
        monkeypatch.setattr(SpikingLinear, "runs_in_triton", lambda self: True)
    return replays


def places(work: Any) -> list[int]:
    """Where the buffers of the present generation lie, which a graph would have in it."""
    buffers = work.func.__self__._buffers
    stored = [x for layer in buffers.layers for x in (layer.keys, layer.cumulative_length)]
    return [x.data_ptr() for x in (*stored, buffers.length, buffers.seen)]


def prompt(tokens: int, batch: int = 1, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts, all but the first padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate(model: Any, prompts: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("cache_implementation", "dynamic")
    with torch.no_grad():
        ids: Tensor = model.generate(**prompts, **options)
    return ids


@pytest.mark.parametrize(
    ("tokens", "padded"), [(1, 128), (128, 128), (129, 256), (1024, 1024), (1025, 1280)]
)
def test_padded_lengths(tokens: int, padded: int) -> None:
    assert padded_length(tokens) == padded


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (2, 3), (3, 4)])
def test_tokens_are_those_of_the_dynamic_cache(model, replayed, batch, padding):
    lengths = (5, 9, 31, 9, 120, 130, 140, 200, 9, 128)
    for seed, tokens in enumerate(lengths):
        given = prompt(tokens, batch, padding, seed)
        expected = generate(model, given)
        assert torch.equal(generate(model, given, **STATIC), expected), tokens
    # Capacities of 128, 256; 256; lengths are met, recorded, replayed.
    assert replayed.count(PREFILL) >= 2
    assert replayed.count(STEP) > len(lengths)


def test_a_length_is_met_then_recorded_then_replayed(model, replayed):
    given = prompt(9)
    for replays in (0, 0, 1, 2):
        generate(model, given, **STATIC, max_new_tokens=1)
        assert replayed == [PREFILL] * replays
    lengths = {int(layer.cumulative_length) for layer in model._steps._buffers.layers}
    assert lengths == {9}  # not the padded one


def test_padding_of_the_last_prompt_does_not_stay(model, replayed):
    """Masks, positions and tokens of one call are not those of the next."""
    padded, whole = prompt(20, 2, 13), prompt(11, 2, 0, seed=1)
    expected = [generate(model, given) for given in (padded, whole)]
    for given, tokens in zip((padded, whole) * 3, expected * 3, strict=True):
        assert torch.equal(generate(model, given, **STATIC), tokens)
    assert replayed.count(PREFILL) == 4


def test_sampled_tokens_are_the_same(model, replayed):
    drawn = []
    for _ in range(3):
        torch.manual_seed(0)
        drawn.append(generate(model, prompt(9), **STATIC, do_sample=True, top_k=8))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert PREFILL in replayed


def test_sizes_share_the_memory_of_the_largest(model, replayed):
    large, small = prompt(200, 2), prompt(30, 2)
    expected = [generate(model, given) for given in (large, small)]
    generate(model, large, **STATIC)
    stored = model._steps._buffers.layers[0].keys
    assert stored.shape[0::2] == (2, 256)
    for _ in range(3):
        for given, tokens in zip((large, small), expected, strict=True):
            assert torch.equal(generate(model, given, **STATIC), tokens)
            assert model._steps._buffers.layers[0].keys.data_ptr() == stored.data_ptr()
    assert replayed.count(PREFILL) == 3
    generate(model, prompt(300, 2), **STATIC)  # needs more: all begin anew
    assert len(model._steps._known) == 1
    assert torch.equal(generate(model, small, **STATIC), expected[1])


def test_only_the_last_sizes_are_kept(model, replayed, monkeypatch):
    monkeypatch.setattr(decoding, "_KEPT_BUFFERS", 2)
    monkeypatch.setattr(decoding, "_KEPT_PROMPTS", 1)
    given = [prompt(tokens, batch) for tokens, batch in ((300, 2), (140, 2), (9, 2), (9, 1))]
    for one in given:
        generate(model, one, **STATIC)
        assert len(model._steps._known) <= 2
    for tokens in (130, 60, 130):  # of one capacity
        generate(model, prompt(tokens), **STATIC, max_new_tokens=200 - tokens)
        assert list(model._steps._buffers.prompts) == [padded_length(tokens)]
    assert PREFILL not in replayed


@pytest.mark.parametrize("limit", ["MOST_TOKENS", "_MOST_PAIRS", "_MOST_SCORES"])
def test_large_prompts_are_not_recorded(model, replayed, monkeypatch, limit):
    monkeypatch.setattr(decoding, limit, 100)
    # sdpa and the kernels for encoded operands on a GPU never have all scores in memory.
    sparing = CUDA or model.config._attn_implementation == "sdpa"
    recorded = limit == "_MOST_SCORES" and sparing
    given = prompt(9)
    expected = generate(model, given)
    for _ in range(3):
        assert torch.equal(generate(model, given, **STATIC), expected)
    assert (PREFILL in replayed) is recorded
    model.config._attn_implementation, before = "eager", model.config._attn_implementation
    if before == "sdpa":
        replayed.clear()
        for _ in range(3):
            assert torch.equal(generate(model, given, **STATIC), expected)
        assert PREFILL not in replayed


def test_chunks_of_prompts_go_to_transformers(replayed):
    model, given = make_model("float"), prompt(9)  # transformers gives the cache the model's dtype
    expected = generate(model, given)
    for _ in range(3):
        assert torch.equal(generate(model, given, **STATIC, prefill_chunk_size=4), expected)
    assert PREFILL not in replayed


def test_what_cannot_be_recorded_runs_without(model, replayed, monkeypatch, caplog):
    def refuse(work: Any, beside: Any = None) -> Any:
        raise RuntimeError("something waits")

    monkeypatch.setattr(decoding, "Recording", refuse)
    given = prompt(9), prompt(150)
    expected = [generate(model, one) for one in given]
    with caplog.at_level(logging.WARNING, "snnllm.decoding"):
        for one, tokens in zip(given * 3, expected * 3, strict=True):
            assert torch.equal(generate(model, one, **STATIC), tokens)
    assert sorted(record.args[0] for record in caplog.records) == ["decoding", "the prefill"]


def test_an_interrupted_generation_leaves_nothing_behind(model, replayed):
    class Stop:
        def __init__(self, after: int) -> None:
            self.after = after

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] == 9 + self.after:
                raise KeyboardInterrupt
            return scores

    given, expected = prompt(9), generate(model, prompt(9))
    for after in (0, 2, 0, 2):
        with pytest.raises(KeyboardInterrupt):
            generate(model, given, **STATIC, logits_processor=[Stop(after)])
        assert torch.equal(generate(model, given, **STATIC), expected)
    assert PREFILL in replayed


def test_a_prefill_that_fails_leaves_nothing_behind(model, replayed, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    given, expected = prompt(9), generate(model, prompt(9))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_prefill", fail)
        with pytest.raises(KeyboardInterrupt):
            generate(model, given, **STATIC)
    for _ in range(3):
        assert torch.equal(generate(model, given, **STATIC), expected)
    assert PREFILL in replayed


def test_the_inference_mode_has_its_own_buffers(model, replayed):
    given = prompt(9)
    expected = generate(model, given)
    for inference in (True, True, True, False, False, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(generate(model, given, **STATIC), expected)
    assert replayed.count(PREFILL) == 3


def test_a_prefill_made_in_the_inference_mode_serves_others(model, replayed):
    given = prompt(9)
    expected = generate(model, given)
    for inference in (False, True, False, False):
        with torch.inference_mode(inference):
            assert torch.equal(generate(model, given, **STATIC), expected)
    assert replayed.count(PREFILL) == 2


def test_memory_that_is_short_for_padding_is_enough_without(model, replayed, monkeypatch, caplog):
    given = prompt(9)
    expected = generate(model, given)

    def fail(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("nothing left")

    monkeypatch.setattr(recording.Buffers, "run_prompts", fail)
    for _ in range(3):
        assert torch.equal(generate(model, given, **STATIC), expected)
    assert PREFILL not in replayed
    assert caplog.text.count("prompts are not padded to 128 tokens: nothing left") == 1


def test_logits_that_a_processor_keeps_stay(model, replayed):
    kept: dict[str, list[Tensor]] = {"": [], "static": []}
    for options, seen in zip(({}, STATIC), kept.values(), strict=True):
        generate(
            model, prompt(9), **options, logits_processor=[lambda _, x, s=seen: s.append(x) or x]
        )
    for ours, theirs in zip(*kept.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_changed_model_is_recorded_again(model, replayed):
    given = prompt(9)
    for _ in range(3):
        generate(model, given, **STATIC)
    assert PREFILL in replayed
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)
    replayed.clear()
    expected = generate(model, given)
    assert torch.equal(generate(model, given, **STATIC), expected)
    assert PREFILL not in replayed
    model.model.layers[0].mlp.down_proj.invalidate()
    for _ in range(2):
        assert torch.equal(generate(model, given, **STATIC), expected)
    assert PREFILL not in replayed


def test_models_and_copies_have_their_own_recordings(model, replayed):
    given = prompt(9)
    expected = generate(model, given)
    for _ in range(3):
        generate(model, given, **STATIC)
    replays = len(replayed)
    copied = copy.deepcopy(model)
    assert not copied._steps._known
    assert not pickle.loads(pickle.dumps(DecodeSteps()))._known
    assert torch.equal(generate(copied, given, **STATIC), expected)
    assert PREFILL not in replayed[replays:]
    assert torch.equal(generate(model, given, **STATIC), expected)
    assert PREFILL in replayed[replays:]
    places_of = [m._steps._buffers.layers[0].keys.data_ptr() for m in (model, copied)]
    assert places_of[0] != places_of[1]
