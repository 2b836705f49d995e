from __future__ import annotations

from typing import Any

import pytest
import torch

from neurons import SpikeEncoder
from sims.selection import Site, find_sites, parse_indices, select_channels


def site(salient: list[int], channels: int = 12) -> Site:
    group = torch.zeros(channels, dtype=torch.uint8)
    group[salient] = 1
    return Site("layer", SpikeEncoder(group, steps=(1, 2)), 0, group)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("3,0", [0, 3]),
        ("-1", [4]),
        ("1:3", [1, 2]),
        (":2, -1", [0, 1, 4]),
        ("3:", [3, 4]),
        ([2, 2, -5], [0, 2]),
    ],
)
def test_indices(selection: Any, expected: list[int]) -> None:
    assert parse_indices(selection, 5, "token", "the prompt") == expected


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("5", r"the prompt has no token 5; 0\.\.4 exist"),
        ([-6], "no token -6"),
        ("two", "Cannot read 'two' as a token"),
        ("", "Cannot read ''"),
        ([], "selects no token"),
        ("3:3", "selects no token"),
    ],
)
def test_bad_indices(selection: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_indices(selection, 5, "token", "the prompt")


def test_channels_by_kind() -> None:
    layer = site([2, 5, 7])
    assert select_channels("salient", layer) == [2, 5, 7]
    assert select_channels("ordinary", layer) == [0, 1, 3, 4, 6, 8, 9, 10, 11]
    assert select_channels("salient", site([])) == []


@pytest.mark.parametrize(("salient", "few"), [([], 0), ([3], 1), ([1, 2, 5, 9], 2)])
def test_auto_channels_take_half_from_each_kind_where_they_can(
    salient: list[int], few: int
) -> None:
    chosen = select_channels("auto:4", site(salient))
    assert len(chosen) == len(set(chosen)) == 4
    assert len(set(chosen) & set(salient)) == few


def test_auto_channels_fill_up_with_salient_ones() -> None:
    assert len(select_channels("auto:10", site(list(range(9))))) == 10
    assert len(select_channels("auto:99", site([1]))) == 12


def test_bad_channels_name_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layer has no channel 12; 0\.\.11 exist"):
        select_channels("12", site([]))
    with pytest.raises(ValueError, match="auto:N with N >= 1"):
        select_channels("auto:0", site([]))


def test_layers_by_pattern(spiking_stories: Any) -> None:
    names = [s.name for s in find_sites(spiking_stories, ["model.layers.1.mlp.*", "*.0.*.k_*"])]
    assert names == [
        "model.layers.0.self_attn.k_encoder",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_layer_names_are_module_names(spiking_stories: Any) -> None:
    modules = dict(spiking_stories.named_modules())
    assert all(s.name in modules for s in find_sites(spiking_stories, "*"))


@pytest.mark.parametrize("pattern", ["model.layers.9.*", "lm_head", "model.layers.0"])
def test_an_unknown_layer_lists_the_layers(spiking_stories: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.\{0\.\.4\}\.mlp\.down_proj"):
        find_sites(spiking_stories, pattern)


def test_no_layer_chosen(spiking_stories: Any) -> None:
    with pytest.raises(ValueError, match="No layer was chosen"):
        find_sites(spiking_stories, [])


def test_a_dense_model_has_nothing_to_record(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="no spiking activations"):
        find_sites(tiny_llama, "*")
