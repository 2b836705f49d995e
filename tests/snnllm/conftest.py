"""Tiny LLaMAs, converted checkpoints and the tolerances that the tests of this folder share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.data import load_text, random_windows, tokenize
from snnllm.layout import LinearLayout
from snnllm.linear import SpikingLinear
from snnllm.weights import round_to_nearest


@pytest.fixture(scope="session")
def tolerance() -> SimpleNamespace:
    """Every float tolerance of this folder, by the reason it is needed."""
    return SimpleNamespace(
        # Only the float matmuls (P V, head) may sum in another order when the shapes differ.
        reordered_sum=1e-5,
        # Scores of the same statistics, summed by another formula.
        score=2e-4,
        # Attention kernels, in units of the largest |V|: P times a threshold as two bfloat16 numbers;
        # P, V and the output rounded to 16 bits.
        two_terms=2.0**-14,
        half_precision=2.0**-7,
        # W8A8 against float on a random model.
        sqnr_w8a8_db=25.0,
    )


def llama(**overrides: Any) -> Any:
    """A random LLaMA whose weights are large enough to make its outputs differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**values, **overrides})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.1)
        return model


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Any]:
    """Build a random tiny LLaMA; keyword arguments go to `LlamaConfig`."""
    return llama


@pytest.fixture(scope="session")
def spike_for() -> Callable[..., SpikeConfig]:
    """A configuration that a pipeline converts: `(pipeline, **overrides)`."""

    def choose(pipeline: Any, **overrides: Any) -> SpikeConfig:
        preset = "TW1.4A4T2" if pipeline == "gptq" else "W4A4T2"
        return SpikeConfig.preset(preset, **overrides)

    return choose


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    """Six windows of 24 random ids without special tokens, for the tiny models."""
    return torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def convert_tiny(
    token_ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Path]]:
    """Convert a tiny LLaMA: `(preset, overrides, **llama_config)` -> (dense model, folder)."""

    def run(
        preset: str = "W4A4T2", overrides: dict[str, Any] | None = None, **config: Any
    ) -> tuple[Any, Path]:
        dense = llama(**config)
        folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
        convert(
            dense,
            folder,
            SpikeConfig.preset(preset, **(overrides or {})),
            token_ids[:1],
            pipeline="rtn",
        )
        return dense, folder

    return run


@pytest.fixture(scope="session")
def tiny_pair(convert_tiny: Callable[..., tuple[Any, Path]]) -> tuple[Any, Path]:
    """A tiny LLaMA and its W4A4T2 checkpoint. Shared: do not change them."""
    return convert_tiny(overrides={"salient_ratio": 0.2})


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_pair: tuple[Any, Path]) -> Path:
    """The W4A4T2 checkpoint of a tiny LLaMA. Shared: do not change it."""
    return tiny_pair[1]


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="session")
def stories_ids(stories_tokenizer: Any) -> Tensor:
    """Token ids of real English text."""
    return tokenize(load_text("pydoc:train")[:60_000], stories_tokenizer)


@pytest.fixture(scope="session")
def stories_checkpoint(
    stories_dir: Path, stories_ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The W4A4T2 checkpoint of stories260K. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("stories") / "checkpoint"
    spike = SpikeConfig.preset("W4A4T2")
    convert(stories_dir, folder, spike, random_windows(stories_ids, 128, 4, seed=0), pipeline="rtn")
    return folder


@pytest.fixture(scope="session")
def make_linear() -> Callable[..., SpikingLinear]:
    """Build a filled `SpikingLinear` from random numbers; see the signature of the inner function."""

    def build(
        channels: int = 24,
        out: int = 10,
        *,
        seed: int = 0,
        weight_bits: int = 4,
        bits: int = 4,
        steps: tuple[int, ...] = (1, 2),
        ratio: float = 0.25,
        value_range: str = "split",
        capacity: str = "steps",
        group_size: int | None = None,
        bias: bool = True,
        name: str = "layer",
    ) -> SpikingLinear:
        generator = torch.Generator().manual_seed(seed)
        layout = LinearLayout(weight_bits, bits, steps, value_range, capacity, group_size)
        module = SpikingLinear(channels, out, bias, layout, name)
        salient = torch.rand(channels, generator=generator).argsort() < round(ratio * channels)
        group = salient.to(torch.uint8) * (len(steps) - 1)
        if len(steps) > 2:
            group = torch.randint(0, len(steps), (channels,), generator=generator)
        module.set_channel_group(group.to(torch.uint8))
        weight = torch.randn(out, channels, generator=generator)
        offset = torch.randn(out, generator=generator) if bias else None
        if weight_bits == 16:
            module.set_float_weight(weight, offset)
        else:
            quantized = round_to_nearest(weight[:, module.order], weight_bits, group_size)
            module.set_weight(quantized, offset)
        return module.eval()

    return build


# Made up for these tests, short, in the format of the published data.
ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa_val": [
        {"goal": "keep milk fresh", "sol1": "a cold box", "sol2": "a hot oven", "label": 0},
        {"goal": "see at night", "sol1": "close both eyes", "sol2": "a lamp", "label": 1},
    ],
    "arc_easy_test": [
        {
            "question": "What do plants need?",
            "choices": {"text": ["light", "shoes", "a hat"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        {
            "question": "What melts?",
            "choices": {"text": ["a stone", "ice"], "label": ["1", "2"]},
            "answerKey": "2",
        },
    ],
    "boolq_val": [
        {"passage": "A cat -- It is small.", "question": "is a cat small", "label": 1},
        {"passage": "Snow -- It is white.", "question": "is snow black", "label": 0},
    ],
    "hellaswag_val": [
        {"query": "Play: A boy", "choices": ["ran.", "flew off.", "sat", "is a car"], "label": 2},
        {"query": "Cook: Mom", "choices": ["sings a song", "cuts.", "is red", "x"], "label": 1},
    ],
    "winogrande_val": [
        {"sentence": "Tom saw Tim, so _ ran.", "option1": "Tom", "option2": "Tim", "answer": "1"},
        {"sentence": "The cup or the _ fell.", "option1": "lid", "option2": "box", "answer": "2"},
    ],
}
ROWS["arc_challenge_test"] = ROWS["arc_easy_test"][::-1]


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two rows of each task."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
