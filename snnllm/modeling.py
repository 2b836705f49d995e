"""`SpikingLlamaForCausalLM`: transformers' own LLaMA with spiking linears and spiking attention."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from snnllm import checkpoint
from snnllm.attention import SPIKING_ATTENTION, SpikingLlamaAttention, register_attention
from snnllm.block import CACHE_ARGUMENT, fuse_block, fuse_norm, fuse_rotary, prepare
from snnllm.config import FLOAT_BITS, SpikeConfig
from snnllm.decoding import DecodeSteps, records_on, static_cache
from snnllm.execution import choose_views
from snnllm.hf_quantizer import register_quantizer
from snnllm.layout import LinearLayout
from snnllm.linear import SpikingLinear
from snnllm.locate import SPIKING
from snnllm.precision import FLOAT32_BUFFERS
from snnllm.sampling import sample
from snnllm.ternary_linear import TernaryLinear
from snnllm.vocabulary import quantize_vocabulary

_log = logging.getLogger(__name__)
MODEL_TYPE = SPIKING
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linears of a LLaMA block, in the order of execution."""

_SAMPLED = {
    *("logits_processor", "stopping_criteria", "generation_config", "streamer", "synced_gpus"),
    *("attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE_ARGUMENT),
}
"""What `generate` hands on of an ordinary call; others go to transformers' own loop."""
_MASKED = ("eager", "sdpa", SPIKING_ATTENTION)
"""Attention functions that take the masks of recorded steps; others have masks of their own kind."""


class SpikingLlamaConfig(LlamaConfig):
    """A LLaMA configuration with a spiking `quantization_config` (`SpikeConfig.to_dict`)."""

    model_type = MODEL_TYPE

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: the shim is the remote code, no checkpoint gets a copy of this module."""

    @property
    def spike(self) -> SpikeConfig:
        """The spiking part.

        Raises:
            ValueError: There is none, or it was written by another schema version.
        """
        data = getattr(self, "quantization_config", None)
        if data is None:
            raise ValueError(
                "This spiking_llama config has no quantization_config. Make checkpoints with "
                "`snnllm convert`, or build configs with spiking_config(llama_config, spike_config)."
            )
        return SpikeConfig.from_dict(data if isinstance(data, dict) else data.to_dict())


def spiking_config(config: LlamaConfig, spike: SpikeConfig) -> SpikingLlamaConfig:
    """The spiking configuration of a LLaMA configuration."""
    values = config.to_dict()
    for key in ("model_type", "architectures", "quantization_config", "_name_or_path", "auto_map"):
        values.pop(key, None)
    out = SpikingLlamaConfig(**values)
    out.quantization_config = spike.to_dict()
    out.architectures = ["SpikingLlamaForCausalLM"]
    return out


def spike_block(
    block: LlamaDecoderLayer, layer_idx: int, config: LlamaConfig, spike: SpikeConfig
) -> None:
    """Replace the linears and the attention of one decoder block by their spiking counterparts.

    The new modules hold no weights yet (zeros); a pipeline or a checkpoint fills them.
    """
    if spike.encodes_attention:
        attention = SpikingLlamaAttention(config, layer_idx, spike)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, getattr(block.self_attn, name))
        block.self_attn = attention
    prefix = f"model.layers.{layer_idx}"
    for path in LINEARS:
        if f"{prefix}.{path}".endswith(spike.modules_to_not_convert):
            continue
        parent_name, name = path.split(".")
        parent = block.get_submodule(parent_name)
        dense = cast(nn.Linear, getattr(parent, name))
        setattr(parent, name, spiking_linear(dense, spike, f"{prefix}.{path}"))
    fuse_block(block)


def spiking_linear(dense: nn.Linear, spike: SpikeConfig, name: str) -> SpikingLinear:
    """An empty spiking linear of the shape of `dense`."""
    kind = SpikingLinear if spike.mean_steps is None else TernaryLinear
    return kind(
        dense.in_features,
        dense.out_features,
        dense.bias is not None,
        LinearLayout.of(spike, name),
        name,
        dense.weight.dtype,
    )


class SpikingLlamaForCausalLM(LlamaForCausalLM):
    """A causal LLaMA that computes with spikes; `generate`, caches and pipelines work as usual.

    Runs in the collapsed view unless `snnllm.set_view` or `snnllm.use_view` chooses another.

    Attributes:
        provenance: How the model was converted, from the manifest of the folder it was loaded from;
            `save_pretrained` passes it on.
    """

    config_class = SpikingLlamaConfig
    config: SpikingLlamaConfig
    # Loading in half precision must not round these: the codes would change meaning.
    _keep_in_fp32_modules_strict = FLOAT32_BUFFERS

    def __init__(self, config: SpikingLlamaConfig) -> None:
        register()
        spike = config.spike
        # What the caller asked for has come into the config by now, also from `from_pretrained`.
        config._attn_implementation = attention_of(spike, config._attn_implementation)
        super().__init__(config)
        self.provenance: dict[str, Any] = {}
        self._steps: DecodeSteps | None = None
        for index, block in enumerate(self.model.layers):
            spike_block(block, index, config, spike)
        fuse_norm(self.model.norm)
        fuse_rotary(self.model.rotary_emb)
        if spike.embedding_bits != FLOAT_BITS:
            quantize_vocabulary(self)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: the shim is the remote code, no checkpoint gets a copy of this module."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint that `snnllm convert` or `save_pretrained` wrote.

        A local folder is verified first: complete, unchanged since it was written, and of a schema
        version that this package reads.

        Raises:
            snnllm.checkpoint.CheckpointError: Says which file is wrong and what to do.
        """
        register()
        folder = Path(os.fspath(pretrained_model_name_or_path))
        if folder.is_dir():
            checkpoint.verify(folder)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if folder.is_dir():
            model.provenance = dict(checkpoint.read_manifest(folder).get("provenance") or {})
        return loaded

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the attention function, which encoded attention operands leave no choice of.

        Raises:
            ValueError: Another one than `spiking` for encoded Q, K and V, or that one for float ones.
        """
        chosen = attn_implementation
        if isinstance(chosen, dict):
            chosen = chosen.get("", self.config._attn_implementation)
        attention_of(self.config.spike, chosen)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Change the number of tokens, as that of the parent.

        Raises:
            ValueError: The tables have 8 bits, and no rows but those of the checkpoint.
        """
        if self.config.spike.embedding_bits == FLOAT_BITS:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **kwargs)
        tokens, multiple = self.config.vocab_size, pad_to_multiple_of or 1
        if -(-(new_num_tokens or tokens) // multiple) * multiple != tokens:
            self._refuse_tables("are not resized. Resize those")
        return self.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding; tables of 8 bits belong together and stay (ValueError)."""
        if self.config.spike.embedding_bits != FLOAT_BITS:
            self._refuse_tables("are not replaced. Replace those")
        super().set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head; tables of 8 bits belong together and stay (ValueError)."""
        if self.config.spike.embedding_bits != FLOAT_BITS:
            self._refuse_tables("are not replaced. Replace those")
        super().set_output_embeddings(new_embeddings)

    def _refuse_tables(self, what: str) -> None:
        raise ValueError(
            f"embedding_bits={self.config.spike.embedding_bits}: tables of codes {what} "
            "of the dense model and convert it again, or convert with embedding_bits=16."
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save as `snnllm convert` does: packed weights, manifest, and the loader shim."""
        super().save_pretrained(save_directory, **kwargs)
        checkpoint.finish(Path(save_directory), self.config, self.provenance)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """The compiled forward pass, weights packed before; or this one, where kernels are no operators."""
        linears = [m for m in self.modules() if isinstance(m, SpikingLinear)]
        if not all(linear.runs_in_triton() for linear in linears):
            return self.__call__
        prepare(self)
        return super().get_compiled_call(compile_config)

    def _prepare_cache_for_generation(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Refuse an offloaded cache without CUDA, where transformers would die of a missing driver.

        Raises:
            ValueError: Says which caches there are.
        """
        asked = generation_config.cache_implementation or ""
        if asked.startswith("offloaded") and not torch.cuda.is_available():
            raise ValueError(
                f"cache_implementation={asked!r} keeps the cache of a CUDA GPU in host memory, and torch "
                "finds no such GPU. On a CPU every cache is there: use 'dynamic' or 'static'."
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def _sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Greedy decoding and sampling: recorded steps with a static cache on a GPU (`snnllm.decoding`).

        Whoever passes a `compile_config`, `disable_compile`, a cache of his own, asks for more than
        the tokens, for a dynamic cache or a large one (`decoding.MOST_TOKENS`), has processors or criteria of his
        own without asking for a static cache, hooks a module, or generates with the model in another thread, too,
        gets the loop of transformers.
        """
        config = kwargs.get("generation_config")
        criteria = kwargs.get("stopping_criteria")
        length = getattr(criteria, "max_length", None)
        recorded = (
            not args
            and not self.training
            and records_on(self.device)
            and input_ids.device == self.device
            and not torch.is_autocast_enabled(self.device.type)
            and self.config._attn_implementation in _MASKED
            and len(set(getattr(self, "hf_device_map", {}).values())) <= 1
            and config is not None
            and config.compile_config is None
            and not config.disable_compile
            and not config.return_dict_in_generate
            and not config.is_assistant
            and not kwargs.get("synced_gpus")
            and not set(kwargs) - _SAMPLED
        )
        cache = None
        if recorded and length is not None and length > input_ids.shape[1]:
            observers = (*(kwargs.get("logits_processor") or ()), *(criteria or ()))
            made = kwargs.get(CACHE_ARGUMENT)
            cache = static_cache(self, config, made, len(input_ids), length, observers)
        if cache is not None and self._steps is None:
            self._steps = DecodeSteps()
        steps = self._steps
        if cache is None or steps is None or not steps.lock.acquire(blocking=False):
            return super()._sample(input_ids, *args, **kwargs)
        try:
            with torch.cuda.device_of(input_ids):  # a graph is recorded on the current device
                if steps.ready(self):
                    names = (
                        "logits_processor",
                        "stopping_criteria",
                        "generation_config",
                        "streamer",
                    )
                    given = {name: kwargs.pop(name, None) for name in names}
                    kwargs.pop("synced_gpus", None)
                    kwargs[CACHE_ARGUMENT] = cache
                    return sample(self, steps, input_ids, **given, model_kwargs=kwargs)
        finally:
            steps.lock.release()
        return super()._sample(input_ids, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What is recorded, and its cache, stays on no device that the model leaves.
        self._steps = None
        return super()._apply(fn, recurse)

    def _init_weights(self, module: nn.Module) -> None:
        # Spiking linears hold integers, which no initialiser may touch.
        if not isinstance(module, SpikingLinear):
            super()._init_weights(module)


def attention_of(spike: SpikeConfig, requested: str | None) -> str:
    """The attention function of a spiking model.

    Args:
        spike: Says whether Q, K and V are encoded.
        requested: `attn_implementation` of the caller, or None for the default.

    Raises:
        ValueError: A function that would read spikes as floats, or floats as spikes.
    """
    if not spike.encodes_attention:
        if requested == SPIKING_ATTENTION:
            raise ValueError(
                f"attn_implementation={requested!r} is for encoded Q, K and V, but this model leaves "
                'them in float (attention="float"); use "sdpa" or "eager".'
            )
        return requested or "sdpa"
    if requested not in (None, SPIKING_ATTENTION):
        raise ValueError(
            f"attn_implementation={requested!r} cannot read the spikes of Q, K and V; this model runs "
            f'with {SPIKING_ATTENTION!r} only. Leave the argument out, or convert with attention="float".'
        )
    return SPIKING_ATTENTION


def register() -> None:
    """Make transformers know the spiking LLaMA: Auto classes, attention, quantizer. Idempotent."""
    register_attention()
    register_quantizer()
    AutoConfig.register(MODEL_TYPE, SpikingLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(SpikingLlamaConfig, SpikingLlamaForCausalLM, exist_ok=True)


def load(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> SpikingLlamaForCausalLM:
    """Load a spiking checkpoint for inference.

    Raises:
        snnllm.checkpoint.CheckpointError: The folder is not a sound spiking checkpoint.
    """
    model = SpikingLlamaForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    if choose_views(model):
        _log.warning(
            "%s has counts beyond 255, which the collapsed view cannot run; it runs unrolled",
            folder,
        )
    return cast(SpikingLlamaForCausalLM, model.eval())


register()  # so that the Auto classes know the architecture once this module is imported
