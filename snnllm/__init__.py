"""Spiking LLaMA models: convert, run, evaluate and simulate.

The public names load on first use, so that ``import snnllm`` costs next to nothing: not even torch
is loaded. Importing this package first also makes ``import transformers`` safe beside a CPU build of
torch (see ``snnllm._compat``).
"""

from __future__ import annotations

import logging
from importlib import metadata

from neurons.lazy import lazy_names
from snnllm._compat import hide_in_time

hide_in_time()
logging.getLogger(__name__).addHandler(logging.NullHandler())

try:
    __version__ = metadata.version("snnllm")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

# Public name -> the module that defines it. A name must differ from every module of this package:
# importing the module would put the module in the name's place.
_PUBLIC_NAMES = {
    "GIFNode": "neurons.gif",
    "SignedGIFNode": "neurons.gif",
    "SpikeEncoder": "neurons.encoder",
    "SpikeConfig": "snnllm.config",
    "View": "snnllm.execution",
    "set_view": "snnllm.execution",
    "use_view": "snnllm.execution",
    "open_source": "snnllm.sources",
    "dense_model": "snnllm.sources",
    "count_operations": "snnllm.operations",
    "SpikingLlamaConfig": "snnllm.modeling",
    "SpikingLlamaForCausalLM": "snnllm.modeling",
    "prepare": "snnllm.block",
    "convert": "snnllm.conversion",
    "PerplexityResult": "snnllm.evaluate",
    "token_perplexity": "snnllm.evaluate",
    "TaskResults": "snnllm.harness",
    "evaluate_tasks": "snnllm.harness",
    "load_text": "snnllm.data",
    "random_windows": "snnllm.data",
    "token_windows": "snnllm.data",
    "tokenize": "snnllm.data",
}

__all__ = ["__version__", *_PUBLIC_NAMES]

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC_NAMES)
