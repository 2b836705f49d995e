"""Simulations of spiking LLaMA models: record what the neurons do, compare the views, plot.

Scripts, each with ``--help``: ``python -m sims.membrane``, ``python -m sims.raster``,
``python -m sims.equivalence``, ``python -m sims.sweep``. From Python::

    from sims.recording import record
    recording = record(model, input_ids, layers=["model.layers.0.*"], channels="salient")
"""

import snnllm  # noqa: F401  (before transformers: hides torchvision where it is broken)
