"""The transformers quantizer plug-in behind `quant_method: spikellm`.

`SpikingLlamaForCausalLM` builds its spiking modules from the configuration alone; the plug-in tells
transformers that such a checkpoint is quantised, serialisable, and checks the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
)
from transformers.quantizers.auto import register_quantizer as hf_register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from neurons import SpikeEncoder
from snnllm.config import SpikeConfig
from snnllm.execution import spiking_modules
from snnllm.head_rotation import HeadRotation
from snnllm.linear import SpikingLinear
from snnllm.precision import restore_float32
from snnllm.shared_input import kernels_run_on

QUANT_METHOD = "spikellm"


class SpikeQuantizationConfig(QuantizationConfigMixin):
    """`SpikeConfig` in the form that transformers carries around."""

    def __init__(self, **values: Any) -> None:
        values.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.spike = SpikeConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The serialised `SpikeConfig`."""
        return self.spike.to_dict()


class SpikeHfQuantizer(HfQuantizer):
    """Loads and saves packed spiking checkpoints."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not spiking_modules(model):
            raise ValueError(
                "quant_method 'spikellm' belongs to spiking_llama checkpoints, but the model has no "
                "spiking modules. Load it with snnllm.SpikingLlamaForCausalLM or AutoModelForCausalLM."
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        restore_float32(model)  # of a model that was loaded in float64
        for module in model.modules():
            if isinstance(module, SpikingLinear):
                module.invalidate()
            elif isinstance(module, SpikeEncoder):
                module.check_groups()  # transformers assigns buffers past `load_state_dict`
            elif isinstance(module, HeadRotation):
                module.check_order()

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed buffers are ordinary tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Weight levels are frozen integers."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether the linears can be operators of torch, those of Triton on a GPU.

        What a model cannot compile (other views, other backends) its `get_compiled_call` runs as it is.
        """
        return torch.cuda.is_available() and kernels_run_on("cuda")


def register_quantizer() -> None:
    """Register the plug-in with transformers. Idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        hf_register_quantizer(QUANT_METHOD)(SpikeHfQuantizer)
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(SpikeQuantizationConfig)
