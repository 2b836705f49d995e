"""The omniquant pipeline: an exact transformation, a frozen block that is the trained one, better than rounding."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snnllm.checkpoint import read_manifest
from snnllm.config import SpikeConfig, WeightRange
from snnllm.conversion import convert
from snnllm.execution import View, use_view
from snnllm.modeling import load
from snnllm.pipelines import omniquant
from snnllm.pipelines.omniquant import omniquant_config
from snnllm.pipelines.omniquant_block import TrainableBlock
from snnllm.pipelines.omniquant_options import OmniQuantOptions, Recipe, recipe_config
from snnllm.pipelines.omniquant_training import Trainer, train
from snnllm.pipelines.streaming import BlockStatistics, BlockStream, Run, load_block
from snnllm.sources import ModelSource, dense_model, open_source


def options(**fields: Any) -> OmniQuantOptions:
    basic = {"epochs": 1, "batch": 3, "rotate": False, "weight_rate": 0.0, "scale_power": 0.5}
    return OmniQuantOptions(**{**basic, **fields})


class Bench:
    """One block of a model, ready to train."""

    def __init__(
        self, model: Any, ids: Tensor, spike: SpikeConfig, wanted: OmniQuantOptions
    ) -> None:
        self.source, self.run = ModelSource(model, "tiny"), Run(ids)
        self.spike = omniquant_config(spike, wanted)
        self.stream = BlockStream(self.source, self.run)
        self.dense = load_block(self.source, 0, torch.device("cpu"))
        statistics = BlockStatistics(self.dense, self.source.config, self.spike)
        with statistics.observing():
            self.target = list(self.stream.run(self.dense))
        job = omniquant._Job(self.source, self.spike, self.run, wanted, None, {})
        generator = self.run.generator(0)
        self.frame = load_block(self.source, 0, torch.device("cpu"))
        attention = omniquant._make_frame(*(self.frame, 0, statistics, self.stream, job, generator))
        self.modules = omniquant._empty_linears(self.dense, 0, statistics, job, generator)
        clips = self.spike.weight_range is WeightRange.CLIP
        self.block = TrainableBlock(
            self.dense,
            attention,
            self.modules,
            self.source.config,
            [i.max_abs for i in statistics.inputs],
            [i.second_moment.diagonal() for i in statistics.inputs] if clips else None,
            [i.mean for i in statistics.inputs] if self.spike.input_offset else None,
            wanted,
        )
        context = self.stream.context
        self.context = (*context["position_embeddings"], context["attention_mask"])


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("config", [{}, BIASES, {"num_key_value_heads": 4}, {"head_dim": 12}])
def test_the_transformation_leaves_the_float_block_unchanged(make_llama, token_ids, config):
    bench = Bench(make_llama(**config), token_ids, SpikeConfig.preset("W4A4T2"), options())
    block, generator = bench.block, torch.Generator().manual_seed(1)
    for scale in block.scales.values():
        scale.data = torch.exp(torch.randn(scale.shape, generator=generator))
    for unit in block.units:
        unit.layout = None  # float weights ...
        unit.operand = None  # ... and inputs; the offsets stay
        unit.offset.data += torch.randn(unit.offset.shape, generator=generator)
    block.query = None
    with torch.no_grad():
        out = block(bench.stream.hidden[0], *bench.context)
    torch.testing.assert_close(out, bench.target[0], atol=2e-5, rtol=2e-5)


SETTINGS = [
    ("W4A4T2", {}, {}),
    ("W4A4T2", {"value_range": "shared", "weight_range": "minmax"}, {"offset": False}),
    ("W4A4T2", {"mask_scope": "input"}, {"segment_scales": False, "query_groups": False}),
    ("W4A4T2", {"weight_group_size": 16}, {"scale_down": False}),
    ("W4A4T2", {"modules_to_not_convert": ("lm_head", "k_proj", "down_proj")}, {}),
    ("W4A4T2", {"attention": "float"}, {"clip_activations": False}),
    ("W2A16", {}, {}),
    ("A4T2", {}, {"weight_rate": 0.01}),
    ("W8A8", {}, {"scale_power": None}),
]


def train_and_freeze(make_llama, token_ids, preset, fields, wanted):
    """Outputs of a trained block and of the spiking block that it becomes."""
    spike, model = SpikeConfig.preset(preset, **fields), make_llama(**BIASES)
    model.model.layers[0].self_attn.k_proj.bias.data += 3.0  # so that the offset of K matters
    bench = Bench(model, token_ids, spike, options(**wanted))
    if bench.spike.key_offset:
        assert bench.frame.self_attn.offset_key.abs().max() > 1.0
    samples = omniquant.Samples(
        bench.stream.hidden, bench.target, None, bench.context, torch.device("cpu")
    )
    before = {k: v.clone() for k, v in bench.block.named_parameters()}
    train(bench.block, samples, bench.run.generator(0), "block 0")
    changed = [k for k, v in bench.block.named_parameters() if not torch.equal(v, before[k])]
    assert any("scales" in name for name in changed)
    omniquant.freeze(bench.block, bench.frame, bench.modules)
    with torch.no_grad():
        trained = bench.block(bench.stream.hidden[0], *bench.context)
    frozen = bench.stream.run_one(bench.frame, 0)
    return trained, frozen


@pytest.mark.parametrize(("preset", "fields", "wanted"), SETTINGS)
def test_what_is_frozen_is_what_was_trained(make_llama, token_ids, preset, fields, wanted):
    trained, frozen = train_and_freeze(make_llama, token_ids, preset, fields, wanted)
    error = (trained - frozen).square().mean() / trained.square().mean()
    # A value at a rounding tie may fall to the other side; most do not.
    assert float(error) < 1e-3
    assert float(((trained - frozen).abs() < 1e-4).float().mean()) > 0.8


def test_commensurate_thresholds_are_trained_as_split(make_llama, token_ids):
    fields = {"value_range": "commensurate"}
    trained, frozen = train_and_freeze(make_llama, token_ids, "W4A4T2", fields, {})
    error = (trained - frozen).square().mean() / trained.square().mean()
    assert 1e-3 < float(error) < 0.1  # the same neurons with thresholds that are rounded up


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("recipe", list(Recipe))
def test_views_are_equal_and_the_model_is_saved(make_llama, token_ids, tmp_path, recipe, rotate):
    spike = recipe_config(recipe, "W4A4T2")
    model, folder = make_llama(), tmp_path / "out"
    wanted = OmniQuantOptions.recipe(recipe, epochs=2, batch=2, rotate=rotate, second_loss=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = convert(model, folder, spike, token_ids, pipeline="omniquant", options=wanted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(b.loss_after < 1.3 * b.loss_before and b.step_ms > 0 for b in report.blocks)
    assert "loss" in str(report.blocks[0])
    recorded = read_manifest(folder)["provenance"]["options"]
    assert (recorded["epochs"], recorded["loss"]) == (2, str(wanted.loss))
    model = load(folder)
    with torch.no_grad():
        expected = model(token_ids).logits
        for view in (View.UNROLLED, View.BINARY):
            with use_view(model, view):
                assert torch.equal(model(token_ids).logits, expected)


def test_training_beats_rounding_on_a_trained_model(stories_dir, stories_ids, tmp_path):
    source = open_source(str(stories_dir))
    windows = stories_ids[: 8 * 128].view(8, 128)
    held_out = stories_ids[2048 : 2048 + 512].view(4, 128)
    spike, noise = SpikeConfig.preset("W4A4T2"), {}
    with torch.no_grad():
        target = dense_model(source)(held_out).logits
    for pipeline in ("rtn", "omniquant"):
        convert(source, tmp_path / pipeline, spike, windows, pipeline=pipeline)
        with torch.no_grad():
            logits = load(tmp_path / pipeline)(held_out).logits
        noise[pipeline] = float((logits - target).square().sum())
    assert noise["omniquant"] < 0.8 * noise["rtn"]


def test_the_same_seed_gives_the_same_bits(make_llama, token_ids, tmp_path):
    for name in ("a", "b"):
        convert(
            *(make_llama(), tmp_path / name, SpikeConfig(), token_ids),
            pipeline="omniquant",
            options=options(),
        )
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b")]
    assert weights[0] == weights[1]


@pytest.mark.slow  # minutes of tracing and compiling
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_step_trains_as_an_eager_one(make_llama, token_ids, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    losses = []
    for execution in ("eager", "compiled"):
        bench = Bench(make_llama(), token_ids, SpikeConfig(), options(execution=execution))
        samples = omniquant.Samples(
            bench.stream.hidden, bench.target, None, bench.context, torch.device("cpu")
        )
        try:
            losses.append(train(bench.block, samples, bench.run.generator(0), "block 0").after)
        except RuntimeError as error:  # no C++ compiler
            pytest.skip(f"torch.compile does not work here: {error}")
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


# -- refusals ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_block(make_llama, token_ids, tmp_path):
    wanted = options(scale_rate=1e30, epochs=3, decay=False)
    with pytest.raises(FloatingPointError, match=r"block 0: the loss is (nan|inf) in epoch"):
        convert(
            *(make_llama(), tmp_path / "out", SpikeConfig(), token_ids),
            pipeline="omniquant",
            options=wanted,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": -1}, "epochs must be an int >= 0, got -1"),
        ({"epochs": True}, "epochs must be an int >= 0, got True"),
        ({"batch": 0}, "batch must be an int >= 1, got 0"),
        ({"scale_rate": math.nan}, "scale_rate must be finite and >= 0, got nan"),
        ({"weight_rate": -1.0}, "weight_rate must be finite and >= 0, got -1.0"),
        ({"scale_power": 2.0}, r"scale_power must lie in \[0, 1\] or be None, got 2.0"),
        ({"loss": "l1"}, "'l1' is not a valid Loss"),
        ({"execution": "fast"}, "'fast' is not a valid Execution"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        OmniQuantOptions(**fields)


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="'best' is not a valid Recipe"):
        OmniQuantOptions.recipe("best")


def test_what_does_not_go_together(make_llama, token_ids, tmp_path):
    maps = {"model.layers.0.mlp.down_proj": torch.ones(64, dtype=torch.int64)}
    with pytest.raises(ValueError, match="explicit allocation maps go with"):
        convert(
            *(make_llama(), tmp_path / "out", SpikeConfig(), token_ids),
            pipeline="omniquant",
            options=options(rotate=True),
            allocation=maps,
        )
    bench = Bench(make_llama(), token_ids, SpikeConfig(), options(execution="graph"))
    samples = omniquant.Samples(
        bench.stream.hidden, bench.target, None, bench.context, torch.device("cpu")
    )
    with pytest.raises(ValueError, match="records CUDA graphs; on the CPU use 'eager'"):
        Trainer(bench.block, samples, 1)
    idle = options(scale_rate=0.0, clip_rate=0.0)
    bench = Bench(make_llama(), token_ids, SpikeConfig(), idle)
    with pytest.raises(ValueError, match="Nothing is learned: every learning rate is 0"):
        Trainer(bench.block, samples, 1)


def test_explicit_maps_are_followed(make_llama, token_ids, tmp_path: Path):
    name = "model.layers.1.mlp.down_proj"
    steps = torch.ones(64, dtype=torch.int64)
    steps[[3, 10]], steps[[0, 63]] = 4, 2
    convert(
        *(make_llama(), tmp_path / "out", SpikeConfig.preset("W4A4T2"), token_ids),
        pipeline="omniquant",
        options=options(),
        allocation={name: steps},
    )
    encoder = load(tmp_path / "out").get_submodule(name).encoder
    assert torch.equal(torch.tensor(encoder.steps)[encoder.channel_group.long()], steps)
