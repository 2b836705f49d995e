"""Convert a dense LLaMA into a spiking checkpoint: source -> pipeline -> folder, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnllm import checkpoint
from snnllm.checks import (
    check_converts,
    check_finite,
    check_names,
    check_windows,
    linear_names,
)
from snnllm.config import SpikeConfig
from snnllm.locate import SourceError
from snnllm.memory import Estimate, estimate, plan, shard_bytes
from snnllm.modeling import spiking_config
from snnllm.pipelines import Pipeline, default_pipeline
from snnllm.pipelines.report import BlockReport, peak_mib, with_weight_columns
from snnllm.pipelines.start import Options, options_of, start_pipeline
from snnllm.pipelines.streaming import Run, stored
from snnllm.saliency import allocate_map
from snnllm.sources import ModelSource, Source, open_source
from snnllm.vocabulary import stored_table
from snnllm.work import WorkFolder, check_output, source_digest
from snnllm.writer import ShardWriter

_PACKAGES = ("snnllm", "torch", "transformers", "spikingjelly", "numpy")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        output: The checkpoint folder.
        spike: The configuration.
        blocks: One report per block, in order.
        spiking_modules: Number of modules that compute with spikes.
        seconds: Wall time, with that of blocks that an interrupted call converted.
        peak_mib: Peak resident memory of the process, MiB.
        weight_bytes: Bytes of all safetensors files.
        linear_bytes: Bytes of the converted linears' codes, scales and zero points.
        linear_weights: Number of weights in the converted linears.
        provenance: Versions, seed, data hash; also in the manifest.
    """

    output: Path
    spike: SpikeConfig
    blocks: tuple[BlockReport, ...]
    spiking_modules: int
    seconds: float
    peak_mib: float
    weight_bytes: int
    linear_bytes: int
    linear_weights: int
    provenance: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["output"] = str(self.output)
        values["spike"] = self.spike.to_dict()
        values["blocks"] = [dataclasses.asdict(b) for b in self.blocks]
        values["bytes_per_weight"] = self.linear_bytes / max(1, self.linear_weights)
        return values


def convert(
    model: str | Path | nn.Module | Source,
    output: str | Path,
    spike: SpikeConfig,
    windows: Tensor,
    *,
    pipeline: Pipeline | str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    allocation: Mapping[str, Tensor] | None = None,
    options: Options | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    restart: bool = False,
    max_memory_mib: float | None = None,
) -> ConversionReport:
    """Convert a dense LLaMA into a spiking checkpoint folder.

    The folder appears under its name only when everything succeeded. Until then every finished block
    is kept in the work folder `OUTPUT.work`; the same call resumes there after an interruption and
    ends with the same bits.

    Args:
        model: A Hugging Face folder, `.gguf` file, hub id, `LlamaForCausalLM`, or an open source.
        output: The checkpoint folder to make; must not exist or be empty.
        spike: The spiking configuration.
        windows: Calibration token ids `[n, S]` (`random_windows` of `snnllm.data`); never test text.
        pipeline: `rtn`, `rotated`, `omniquant` or `gptq`; None for `rotated`, or what the configuration
            needs (`pipelines.default_pipeline`).
        seed: Seed of everything random.
        device: Where a block runs during conversion.
        allocation: Explicit maps channel -> steps per full module name (`model.layers.0.mlp...`).
        options: `RotatedOptions`, `OmniQuantOptions` or `GptqOptions`; None for the defaults of the
            pipeline.
        on_block: Called after each block, for progress.
        on_stage: Called with what comes next, as "block 3: o_proj"; several times a block.
        restart: Discard the work folder of an interrupted conversion.
        max_memory_mib: Keep activations in a file when they would exceed this; None never does.

    Returns:
        The report; `SpikingLlamaForCausalLM.from_pretrained(output)` loads the model.

    Raises:
        SourceError: The model cannot be read or is not a LLaMA.
        ValueError: Bad windows, allocation or weights; or the work folder belongs to a conversion with
            another configuration, other options or other data.
        FloatingPointError: The loss of a block became NaN or infinite; names the block.
        FileExistsError: The output is not empty.
        OSError: The output cannot be written.
    """
    start, target = time.perf_counter(), Path(output)
    pipeline = Pipeline(pipeline or default_pipeline(spike, allocation or {}))
    source = as_source(model)
    spike = with_allocation(source, spike, allocation or {})
    check_windows(windows, source)
    windows = windows.cpu()  # the hidden states live there, and the hash is taken there
    check_names(source, spike, allocation or {})
    check_converts(source, spike)
    check_output(target)
    options = options_of(pipeline, options)
    provenance = make_provenance(source, spike, windows, seed, pipeline)
    if options is not None:
        provenance["options"] = dataclasses.asdict(options)
    check_finite(source)  # the last check, because it takes longest
    run = Run(windows, seed, torch.device(device), on_stage=on_stage)
    work = WorkFolder(target, make_job(source, spike, run, provenance, allocation or {}), restart)
    provenance["job_sha256"] = work.job_sha256
    spill = plan(source, spike, windows.shape, pipeline, max_memory_mib).spills
    run = dataclasses.replace(run, spill=work.folder if spill else None, saved=work.load)
    reports: list[BlockReport] = []
    resumed, finished = work.count, False
    try:
        source, spike, blocks = start_pipeline(
            pipeline, source, spike, run, allocation or {}, options
        )
        for block, report in blocks:
            if report.index >= work.count:
                dtype = source.tensor("model.norm.weight").dtype
                state = {k: stored(k, v, dtype) for k, v in block.state_dict().items()}
                work.save(state, report)
            reports.append(report)
            if on_block is not None:
                on_block(report)
            del block
        spike = with_weight_columns(spike, reports)
        sizes = publish(target, work, source, spike, provenance, shard_bytes(max_memory_mib))
        finished = True
    finally:
        work.close(remove=finished or work.count == 0)
    return ConversionReport(
        target,
        spike,
        tuple(reports),
        seconds=time.perf_counter() - start + sum(report.seconds for report in reports[:resumed]),
        peak_mib=peak_mib(),
        provenance=provenance,
        **sizes,
    )


def make_job(
    source: Source,
    spike: SpikeConfig,
    run: Run,
    provenance: Mapping[str, Any],
    allocation: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Everything that decides about the bits of a conversion."""
    maps = {name: hashlib.sha256(v.numpy().tobytes()).hexdigest() for name, v in allocation.items()}
    return {
        **provenance,
        "spike": spike.to_dict(),
        "model": source_digest(source),
        "device": run.device.type,
        "allocation": maps,
    }


def publish(
    target: Path,
    work: WorkFolder,
    source: Source,
    spike: SpikeConfig,
    provenance: dict[str, Any],
    shard: int,
) -> dict[str, int]:
    """Make the checkpoint folder from the finished blocks.

    Returns:
        `spiking_modules`, `weight_bytes`, `linear_bytes`, `linear_weights`.
    """
    modules = linear_bytes = linear_weights = 0
    with checkpoint.published(target, within=work.folder) as folder:
        writer = ShardWriter(folder, shard)
        name = "model.embed_tokens"
        writer.add(stored_table(name, source.tensor(f"{name}.weight"), spike))
        for index in range(source.config.num_hidden_layers):
            saved = work.load(index)
            assert saved is not None  # every block was saved or restored before
            prefix = f"model.layers.{index}."
            writer.add({prefix + name: tensor for name, tensor in saved.state.items()})
            modules += len(spiking_names(saved.state))
            linear_bytes += sum(
                v.numel() * v.element_size() for k, v in saved.state.items() if ".weight_" in k
            )
            linear_weights += converted_weights(saved.state)
        weight_bytes = _finish(folder, writer, source, spike, provenance)
    return {
        "spiking_modules": modules,
        "weight_bytes": weight_bytes,
        "linear_bytes": linear_bytes,
        "linear_weights": linear_weights,
    }


def spiking_names(state: Mapping[str, Tensor]) -> set[str]:
    """Paths of the spiking modules of a block, from the names of its tensors."""
    encoders = {name.removesuffix(".channel_group") for name in state if "channel_group" in name}
    return {path.rpartition(".")[0] for path in encoders}


def converted_weights(state: Mapping[str, Tensor]) -> int:
    """Number of weights of a block that are integer levels."""
    paths = [n.removesuffix(".weight_codes") for n in state if n.endswith(".weight_codes")]
    return sum(
        len(state[f"{p}.weight_codes"]) * state[f"{p}.encoder.channel_group"].numel() for p in paths
    )


def _finish(
    folder: Path,
    writer: ShardWriter,
    source: Source,
    spike: SpikeConfig,
    provenance: dict[str, Any],
) -> int:
    writer.add({"model.norm.weight": source.tensor("model.norm.weight")})
    if not source.config.tie_word_embeddings:
        writer.add(stored_table("lm_head", source.tensor("lm_head.weight"), spike))
    writer.close()
    config = spiking_config(source.config, spike)
    config.dtype = source.tensor("model.norm.weight").dtype
    config.save_pretrained(folder)
    source.carry_files(folder)
    checkpoint.finish(folder, config, provenance)
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def as_source(model: str | Path | nn.Module | Source) -> Source:
    """Open whatever `convert` accepts as a model."""
    if isinstance(model, Source):
        return model
    if isinstance(model, nn.Module):
        return ModelSource(model, type(model).__name__)
    return open_source(model)


def with_allocation(
    source: Source, spike: SpikeConfig, allocation: Mapping[str, Tensor]
) -> SpikeConfig:
    """Write the group steps of explicit maps into the configuration.

    Raises:
        ValueError: A name that is no linear of the model, or a map of another length.
    """
    known = linear_names(source)
    steps = dict(spike.group_steps)
    for name, channel_steps in allocation.items():
        if name not in known:
            raise ValueError(
                f"allocation names {name!r}, which is no linear of this model; names look like "
                f"{known[0]!r}."
            )
        expected = source.tensor(f"{name}.weight").shape[1]
        if channel_steps.shape != (expected,):
            raise ValueError(
                f"allocation[{name!r}] needs one step count for each of {expected} channels, got "
                f"shape {tuple(channel_steps.shape)}."
            )
        steps[name] = allocate_map(channel_steps)[1]
    return dataclasses.replace(spike, group_steps=steps)


def make_provenance(
    source: Source, spike: SpikeConfig, windows: Tensor, seed: int, pipeline: Pipeline
) -> dict[str, Any]:
    """Versions, source, seed and a hash of the calibration data."""
    return {
        "source": source.name,
        "pipeline": str(pipeline),
        "preset": spike.label,
        "seed": seed,
        "calibration": {
            "windows": windows.shape[0],
            "window": windows.shape[1],
            "sha256": hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest(),
        },
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def package_versions() -> dict[str, str]:
    """Versions of this package and of those that results depend on."""
    return {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source tree"


def write_report(report: ConversionReport, path: Path) -> None:
    """Write a conversion report as JSON."""
    path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")


__all__ = [
    "ConversionReport",
    "Estimate",
    "SourceError",
    "convert",
    "estimate",
    "write_report",
]
