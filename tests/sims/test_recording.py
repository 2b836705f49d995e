from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurons import GIFNode, SpikeEncoder
from sims.recording import Recorder, format_bytes, record
from sims.traces import CSV_COLUMNS, Recording
from snnllm.execution import spiking_modules, use_view
from snnllm.modeling import load


@pytest.fixture(scope="module")
def whole(spiking_stories: Any, prompt_ids: torch.Tensor) -> Recording:
    """Everything of two blocks."""
    layers = ["model.layers.0.*", "model.layers.4.*"]
    return record(spiking_stories, prompt_ids, layers)


def test_recording_covers_linears_and_attention(whole: Recording) -> None:
    assert len(whole.layers) == 20  # 7 linears and q, k, v in each of two blocks
    trace = whole.layers["model.layers.0.self_attn.k_encoder"]
    assert trace.spikes.shape == (2, len(whole.tokens), 32)
    assert trace.threshold.shape == trace.zero_point.shape == (len(whole.tokens), 4, 2)
    assert trace.channel_head.tolist() == [head for head in range(4) for _ in range(8)]


def test_membrane_recursion_holds_exactly(whole: Recording) -> None:
    for trace in whole.layers.values():
        before = trace.v_before_fire
        assert before.dtype == trace.v_after_reset.dtype == np.float32
        np.testing.assert_array_equal(before - trace.spikes, trace.v_after_reset)
        fired = np.clip(np.floor(before), 0, trace.levels - 1)
        allowed = np.arange(len(before))[:, None, None] < trace.steps
        np.testing.assert_array_equal(np.where(allowed, fired, 0), trace.spikes)


def test_channels_of_one_step_are_silent_later(whole: Recording) -> None:
    trace = whole.layers["model.layers.0.mlp.down_proj"]
    ordinary = trace.steps == 1
    assert ordinary.any()
    assert (trace.salient == ~ordinary).all()
    assert not trace.spikes[1:, :, ordinary].any()
    np.testing.assert_array_equal(
        trace.v_after_reset[0][:, ordinary], trace.v_after_reset[1][:, ordinary]
    )
    assert trace.spikes[1:, :, ~ordinary].any()


def test_spikes_sum_to_the_counts_of_the_closed_form(
    spiking_stories: Any, prompt_ids: torch.Tensor, whole: Recording
) -> None:
    name = "model.layers.4.mlp.up_proj"
    module = spiking_stories.get_submodule(name)
    inputs: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), use_view(spiking_stories, "collapsed"):
        spiking_stories(input_ids=prompt_ids[None], use_cache=False)
    hook.remove()
    encoding, trace = module.encoder.encode(inputs[0][0]), whole.layers[name]
    np.testing.assert_array_equal(trace.count, encoding.count.numpy())
    np.testing.assert_array_equal(trace.threshold[:, 0], encoding.threshold.numpy())
    np.testing.assert_array_equal(trace.zero_point[:, 0], encoding.zero_point.numpy())
    decoded = trace.per_channel(trace.threshold) * (
        trace.count - trace.per_channel(trace.zero_point)
    ).astype(np.float32)
    np.testing.assert_array_equal(decoded, module.encoder.decode(encoding).numpy())


def test_charge_is_the_activation_in_thresholds(
    spiking_stories: Any, prompt_ids: torch.Tensor, whole: Recording
) -> None:
    trace = whole.layers["model.layers.0.self_attn.q_proj"]
    block = spiking_stories.model.layers[0]
    with torch.no_grad():
        x = block.input_layernorm(spiking_stories.model.embed_tokens(prompt_ids))
    np.testing.assert_array_equal(trace.charge, x.numpy() / trace.per_channel(trace.threshold))


def test_signed_spikes_sum_to_the_centred_count(whole: Recording) -> None:
    for trace in whole.layers.values():
        centred = trace.count - trace.per_channel(trace.zero_point)
        np.testing.assert_array_equal(trace.signed_spikes.sum(0), centred)
        assert np.abs(trace.signed_spikes).max() <= trace.levels - 1


def test_a_selection_is_a_part_of_the_whole(
    spiking_stories: Any, prompt_ids: torch.Tensor, whole: Recording
) -> None:
    for name in ("model.layers.0.self_attn.v_encoder", "model.layers.4.mlp.gate_proj"):
        part = record(spiking_stories, prompt_ids[None], name, "1,-1", [5, 31, 0]).layers[name]
        rows = [1, len(prompt_ids) - 1]
        assert part.channels.tolist() == [0, 5, 31]
        trace = whole.layers[name]
        np.testing.assert_array_equal(part.spikes, trace.spikes[:, rows][:, :, part.channels])
        np.testing.assert_array_equal(
            part.v_before_fire, trace.v_before_fire[:, rows][:, :, part.channels]
        )
        np.testing.assert_array_equal(part.threshold, trace.threshold[rows])


def test_salient_channels_only_skip_layers_without(
    spiking_stories: Any, prompt_ids: torch.Tensor
) -> None:
    attention = "model.layers.0.self_attn.?_encoder"
    recording = record(spiking_stories, prompt_ids, attention, channels="salient")
    assert [name[-9:] for name in recording.layers] == ["k_encoder", "v_encoder"]
    assert all(trace.salient.all() for trace in recording.layers.values())
    with pytest.raises(ValueError, match="None of the 5 chosen layers has salient channels"):
        record(spiking_stories, prompt_ids, "*.q_encoder", channels="salient")


def untouched(model: Any) -> bool:
    nodes = [m for m in model.modules() if isinstance(m, GIFNode)]
    encoders = [m for m in model.modules() if isinstance(m, SpikeEncoder)]
    return (
        all(
            not n.store_v_seq and n.v_seq is None and not isinstance(n.v, torch.Tensor)
            for n in nodes
        )
        and all(not n._forward_hooks and not n._forward_pre_hooks for n in nodes)
        and all("encode_spikes" not in vars(e) for e in encoders)
        and all(m.view == "collapsed" for _, m in spiking_modules(model))
    )


def test_the_model_is_left_as_it_was(spiking_stories: Any, whole: Recording) -> None:
    assert untouched(spiking_stories)


def test_the_model_is_left_as_it_was_after_an_error(
    spiking_stories_dir: Path, prompt_ids: torch.Tensor
) -> None:
    broken = load(spiking_stories_dir)
    broken.model.layers[1].input_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj.*NaN"):
        record(broken, prompt_ids)
    assert untouched(broken)


def test_a_store_v_seq_that_was_on_stays_on(
    spiking_stories_dir: Path, prompt_ids: torch.Tensor
) -> None:
    name = "model.layers.2.mlp.up_proj"
    model = load(spiking_stories_dir)
    node = model.get_submodule(name).encoder.node
    node.store_v_seq = True
    record(model, prompt_ids, name)
    assert node.store_v_seq


def test_memory_is_computed_before_the_run_and_refused(
    spiking_stories: Any, prompt_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(spiking_stories, "model.layers.0.*", memory_limit=20_000)
    monkeypatch.setattr(spiking_stories, "forward", lambda **_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"needs \d.* KiB, more than the memory limit of 19.5 KiB"):
        recorder.run(prompt_ids)


def test_memory_estimate_covers_what_is_kept(
    spiking_stories: Any, prompt_ids: torch.Tensor, whole: Recording
) -> None:
    kept = sum(
        t.spikes.nbytes + t.v_after_reset.nbytes + t.charge.nbytes + t.threshold.nbytes
        + t.zero_point.nbytes
        for t in whole.layers.values()
    )  # fmt: skip
    recorder = Recorder(spiking_stories, ["model.layers.0.*", "model.layers.4.*"])
    plans = recorder.plan(len(prompt_ids))
    assert sum(plan.kept_bytes for plan in plans) == kept
    assert recorder.bytes_needed(len(prompt_ids)) > kept


def test_fewer_channels_need_less_memory(spiking_stories: Any) -> None:
    few = Recorder(spiking_stories, channels="auto:2", tokens="0").bytes_needed(100)
    assert few < Recorder(spiking_stories).bytes_needed(100) / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_limit": 0}, "at least 1 byte"),
        ({"tokens": "99"}, r"prompt of \d+ tokens has no token 99"),
        ({"channels": "64"}, r"q_proj has no channel 64; 0\.\.63 exist"),
    ],
)
def test_bad_arguments(
    spiking_stories: Any, prompt_ids: torch.Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        record(spiking_stories, prompt_ids, "model.layers.0.self_attn.q_proj", **arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.ones(2, 5, dtype=torch.int64), "prompts one by one"),
        (torch.ones(5), "Expected token ids"),
        (torch.ones(0, dtype=torch.int64), "no tokens"),
        (torch.tensor([1, 512]), "vocabulary of 512"),
    ],
)
def test_bad_prompts(spiking_stories: Any, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(spiking_stories, ids)


def test_token_texts_must_fit(spiking_stories: Any, prompt_ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="1 token texts"):
        record(spiking_stories, prompt_ids, token_text=["one"])


def test_npz_round_trip(spiking_stories: Any, prompt_ids: torch.Tensor, tmp_path: Path) -> None:
    text = [f"word{i}" for i in range(len(prompt_ids))]
    name = "model.layers.3.self_attn.k_encoder"
    saved = record(spiking_stories, prompt_ids, name, "0:2", "auto:4", token_text=text)
    saved = saved.with_metadata(prompt="Once upon")
    saved.save(tmp_path / "a.npz")
    loaded = Recording.load(tmp_path / "a.npz")
    assert loaded.metadata == saved.metadata
    assert loaded.labels == ["word0", "word1"]
    for key, value in vars(saved.select(name)).items():
        np.testing.assert_array_equal(getattr(loaded.select(name), key), value)
    with pytest.raises(KeyError, match=f"recorded: {name}"):
        loaded.select("other")


def test_npz_says_what_it_holds_without_this_package(whole: Recording, tmp_path: Path) -> None:
    whole.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        header = json.loads(str(file["metadata"]))
        assert file["model.layers.0.mlp.up_proj/spikes"].dtype == np.uint8
        assert file["model.layers.0.mlp.up_proj/v_after_reset"].dtype == np.float32
    assert "after fire and reset" in header["units"]["v_after_reset"]
    assert header["spike_config"]["salient_steps"] == 2
    assert header["view"] == "unrolled"


def test_loading_something_else(tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros(3))
    with pytest.raises(ValueError, match="no recording of this package"):
        Recording.load(other)
    other.write_text("text")
    with pytest.raises(ValueError, match="no recording of this package"):
        Recording.load(other)
    np.savez(other, metadata=np.array(json.dumps({"format_version": 99})))
    with pytest.raises(ValueError, match="recording format 99"):
        Recording.load(other)
    with pytest.raises(FileNotFoundError):
        Recording.load(tmp_path / "missing.npz")


def test_csv_holds_the_recursion(
    spiking_stories: Any, prompt_ids: torch.Tensor, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj"
    recording = record(spiking_stories, prompt_ids, name, "2,4", "auto:4")
    recording.write_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == recording.rows == 2 * 4 * 2
    assert {row["token"] for row in rows} == {"2", "4"}
    v = np.float32(0)
    for row in rows:
        start = np.float32(row["zero_point"]) + np.float32(0.5)
        v = start if row["step"] == "0" else v
        h = v + np.float32(row["charge"])
        assert h == np.float32(row["v_before_fire"])
        v = np.float32(row["v_after_reset"])
        assert v == h - int(row["spike"])


def test_a_long_csv_is_refused(whole: Recording, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than the limit of 10"):
        whole.write_csv(tmp_path / "a.csv", max_rows=10)
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**28, "256.0 MiB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
