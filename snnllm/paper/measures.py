"""What is measured on the model of a row: perplexity, zero-shot tasks, operations, speed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnllm.config import FLOAT_BITS
from snnllm.data import load_text, random_windows, token_windows, tokenize
from snnllm.evaluate import Progress, token_perplexity
from snnllm.execution import View, spiking_modules, use_view
from snnllm.harness import evaluate_tasks
from snnllm.linear import SpikingLinear
from snnllm.operations import count_operations
from snnllm.paper.recipes import Baseline, Conversion, Measure
from snnllm.paper.settings import Settings, short_name
from snnllm.sources import Source, dense_model
from snnllm.speed import Contender, time_contenders

__all__ = ["Data", "Measures", "Subject", "standard_measures", "stated_steps"]

_PATIENCE = 20.0
"""Seconds of timing after which a view is not repeated: on a GPU, binary events take minutes."""


@dataclass(frozen=True)
class Data:
    """Token windows that the settings describe.

    Attributes:
        windows: Evaluation windows `[n, W]` by (short) name of the text.
        sample: Fewer windows of the first text, `[n, W]`.
        calibration: Calibration windows `[n, W]`.
        prompt: Tokens of the first evaluation window, `[S]`.
    """

    windows: Mapping[str, Tensor]
    sample: Tensor
    calibration: Tensor
    prompt: Tensor

    @classmethod
    def load(cls, settings: Settings, tokenizer: Any) -> Data:
        """Read and tokenise the texts.

        Raises:
            ValueError: Calibration on an evaluation text, texts that share a name, or a text that is
                too short.
            FileNotFoundError: A text is missing.
        """
        calibration = load_text(settings.calibration)
        ids: dict[str, Tensor] = {}
        for name in settings.texts:
            text = load_text(name)
            if text == calibration:
                raise ValueError(
                    f"{name} is the calibration text, too; a perplexity on it would mean nothing. "
                    "Give another --calibration, for example wikitext2:train."
                )
            if short_name(name) in ids:
                raise ValueError(f"Two evaluation texts are called {short_name(name)}; rename one.")
            ids[short_name(name)] = tokenize(text, tokenizer)
        first = next(iter(ids.values()))
        windows = {n: token_windows(v, settings.window, settings.limit) for n, v in ids.items()}
        sample = token_windows(first, settings.window, settings.sample_limit)
        return cls(
            windows,
            sample,
            random_windows(
                tokenize(calibration, tokenizer),
                settings.calibration_window,
                settings.calibration_windows,
                settings.seed,
            ),
            sample[0, : settings.prompt_tokens],
        )

    def digest(self) -> str:
        """SHA-256 of all windows."""
        digest = hashlib.sha256()
        for windows in (*self.windows.values(), self.sample, self.calibration, self.prompt):
            digest.update(str(tuple(windows.shape)).encode() + windows.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Subject:
    """The model of a row, loaded.

    Attributes:
        title: Of the row.
        model: The model, in evaluation mode on its device.
        tokenizer: Its tokenizer.
        conversion: How it was made; None for the dense model.
        source: The dense model's source.
        data: Windows and prompt.
        figures: Folder for figures.
    """

    title: str
    model: Any
    tokenizer: Any
    conversion: Conversion | Baseline | None
    source: Source
    data: Data
    figures: Path


Measures = Mapping[Measure, Callable[[Subject], dict[str, Any]]]
"""How each measure is taken; the result is JSON-serialisable."""


def standard_measures(settings: Settings, progress: Callable[[str], Progress | None]) -> Measures:
    """The measures that need nothing but this package; figures and audits come from `sims`.

    Args:
        settings: Limits and batch sizes.
        progress: Makes the progress wrapper of a perplexity, from its label.
    """
    return {
        Measure.PERPLEXITY: partial(_perplexity, settings, progress, None),
        Measure.SAMPLE: partial(_perplexity, settings, progress, 1),
        Measure.TASKS: partial(_tasks, settings),
        Measure.OPERATIONS: _operations,
        Measure.SPEED: partial(_speed, settings),
    }


def _perplexity(
    settings: Settings,
    progress: Callable[[str], Progress | None],
    sample: int | None,
    subject: Subject,
) -> dict[str, Any]:
    chosen = dict(subject.data.windows)
    if sample is not None:
        chosen = {next(iter(chosen)): subject.data.sample}
    return {
        name: token_perplexity(
            subject.model, windows, settings.batch_size, progress(f"perplexity, {name}")
        ).to_dict()
        for name, windows in chosen.items()
    }


def _tasks(settings: Settings, subject: Subject) -> dict[str, Any]:
    return evaluate_tasks(
        subject.model,
        subject.tokenizer,
        settings.tasks,
        task_data=settings.task_data,
        limit=settings.task_limit,
        batch_size=settings.task_batch,
    ).to_dict()


def _operations(subject: Subject) -> dict[str, Any]:
    return count_operations(subject.model, subject.data.prompt).to_dict()


def _speed(settings: Settings, subject: Subject) -> dict[str, Any]:
    model, device = subject.model, next(subject.model.parameters()).device
    dense = dense_model(subject.source).to(device)
    contenders = {"dense, float32": Contender(dense)}
    if device.type == "cuda":
        half = dense_model(subject.source).to(device, torch.bfloat16)
        contenders["dense, bfloat16"] = Contender(half)
        # By itself `generate` records steps of the collapsed view as CUDA graphs (`snnllm.decoding`).
        growing = {"cache_implementation": "dynamic"}
        collapsed = partial(use_view, model, View.COLLAPSED)
        contenders["collapsed, dynamic cache"] = Contender(model, collapsed, growing)
    for view in (View.COLLAPSED, View.UNROLLED, View.BINARY):
        contenders[str(view)] = Contender(model, partial(use_view, model, view))
    prompt = torch.randint(
        model.config.vocab_size,
        (1, settings.speed_prompt),
        generator=torch.Generator().manual_seed(settings.seed),
    )
    context = prompt[:, : max(1, settings.speed_prompt // 4)]
    timings = time_contenders(
        *(contenders, prompt, context, settings.speed_tokens, settings.repeat, _PATIENCE)
    )
    return {
        "prompt": prompt.shape[1],
        "context": context.shape[1],
        "timings": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
    }


def stated_steps(model: Any) -> dict[str, Any]:
    """What a spiking model spends: the time steps of its activations.

    Returns:
        `mean_steps`, the time steps of a channel, mean over the channels of all spiking linears (None
        if their inputs are floats), and `spiking_modules`.
    """
    total = channels = 0
    for _, module in spiking_modules(model):
        if isinstance(module, SpikingLinear) and module.layout.activation_bits != FLOAT_BITS:
            group = module.encoder.channel_group.long().cpu()
            total += int(torch.tensor(module.encoder.steps)[group].sum())
            channels += group.numel()
    return {
        "mean_steps": total / channels if channels else None,
        "spiking_modules": len(spiking_modules(model)),
    }
