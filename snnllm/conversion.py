"""Convert a dense LLaMA into a spiking checkpoint: source -> pipeline -> folder, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnllm import checkpoint
from snnllm.checks import check_names, check_shared_steps, check_windows, linear_names
from snnllm.config import FLOAT_BITS, Rotation, SpikeConfig
from snnllm.execution import spiking_modules
from snnllm.linear import SpikingLinear
from snnllm.modeling import spiking_config
from snnllm.pipelines import Pipeline, rotated, rtn
from snnllm.pipelines.basis import find_basis, rotate_source
from snnllm.pipelines.report import BlockReport, peak_mib
from snnllm.pipelines.rotated import RotatedOptions
from snnllm.precision import FLOAT32_BUFFERS
from snnllm.saliency import allocate_map
from snnllm.sources import ModelSource, Source, SourceError, open_source
from snnllm.writer import ShardWriter

_log = logging.getLogger(__name__)
_PACKAGES = ("snnllm", "torch", "transformers", "spikingjelly", "numpy")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        output: The checkpoint folder.
        spike: The configuration.
        blocks: One report per block, in order.
        spiking_modules: Number of modules that compute with spikes.
        seconds: Wall time.
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
    pipeline: Pipeline | str = Pipeline.RTN,
    seed: int = 0,
    device: str | torch.device = "cpu",
    allocation: Mapping[str, Tensor] | None = None,
    options: RotatedOptions | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
) -> ConversionReport:
    """Convert a dense LLaMA into a spiking checkpoint folder.

    The folder appears under its name only when everything succeeded.

    Args:
        model: A Hugging Face folder, `.gguf` file, hub id, `LlamaForCausalLM`, or an open source.
        output: The checkpoint folder to make; must not exist or be empty.
        spike: The spiking configuration.
        windows: Calibration token ids `[n, S]` (`random_windows` of `snnllm.data`); never test text.
        pipeline: `rtn` or `rotated`.
        seed: Seed of everything random.
        device: Where a block runs during conversion.
        allocation: Explicit maps channel -> steps per full module name (`model.layers.0.mlp...`).
        options: Parts of the `rotated` pipeline; None for all of them.
        on_block: Called after each block, for progress.

    Returns:
        The report; `SpikingLlamaForCausalLM.from_pretrained(output)` loads the model.

    Raises:
        SourceError: The model cannot be read or is not a LLaMA.
        ValueError: Bad windows, allocation or weights.
        FileExistsError: The output is not empty.
        OSError: The output cannot be written.
    """
    start = time.perf_counter()
    source = as_source(model)
    spike = with_allocation(source, spike, allocation or {})
    check_windows(windows, source)
    windows = windows.cpu()  # the hidden states live there, and the hash is taken there
    check_names(source, spike, allocation or {})
    provenance = make_provenance(source, spike, windows, seed, Pipeline(pipeline))
    if Pipeline(pipeline) is Pipeline.ROTATED:
        provenance["options"] = dataclasses.asdict(options or RotatedOptions())
    target = Path(output)
    reports: list[BlockReport] = []
    modules = linear_bytes = linear_weights = 0
    with checkpoint.published(target) as folder:
        source, spike, blocks = start_pipeline(
            Pipeline(pipeline),
            source,
            spike,
            windows,
            seed,
            torch.device(device),
            allocation or {},
            options,
        )
        writer = ShardWriter(folder)
        writer.add(_finite(source, "model.embed_tokens.weight"))
        for block, report in blocks:
            prefix = f"model.layers.{report.index}."
            state = {prefix + k: _stored(k, v, source) for k, v in block.state_dict().items()}
            writer.add(state)
            modules += len(spiking_modules(block))
            linear_bytes += sum(
                v.numel() * v.element_size() for k, v in state.items() if ".weight_" in k
            )
            linear_weights += _converted_weights(block)
            reports.append(report)
            if on_block is not None:
                on_block(report)
        if modules == 0:
            raise ValueError(
                "Nothing was converted: every linear is in modules_to_not_convert and the attention "
                "is left in float."
            )
        weight_bytes = _finish(folder, writer, source, spike, dict(provenance))
    return ConversionReport(
        target,
        spike,
        tuple(reports),
        modules,
        time.perf_counter() - start,
        peak_mib(),
        weight_bytes,
        linear_bytes,
        linear_weights,
        provenance,
    )


def start_pipeline(
    pipeline: Pipeline,
    source: Source,
    spike: SpikeConfig,
    windows: Tensor,
    seed: int,
    device: torch.device,
    allocation: Mapping[str, Tensor],
    options: RotatedOptions | None,
) -> tuple[Source, SpikeConfig, Iterator[tuple[nn.Module, BlockReport]]]:
    """The model and configuration that a pipeline really converts, and its blocks.

    Raises:
        ValueError: Something that belongs to the other pipeline.
    """
    if pipeline is Pipeline.RTN:
        _check_rtn(spike, options)
        return source, spike, rtn.convert_blocks(source, spike, windows, seed, device, allocation)
    if allocation:
        raise ValueError(
            "The rotated pipeline chooses its channels before the rotation; explicit allocation maps "
            "go with pipeline='rtn'."
        )
    options = options or RotatedOptions()
    check_shared_steps(source, spike)
    spike = rotated.rotated_config(spike, options)
    generator = torch.Generator().manual_seed(seed)
    basis = find_basis(source, spike, windows, device)
    moved = rotate_source(source, basis, generator if options.rotate else None)
    blocks = rotated.convert_blocks(moved, basis, spike, windows, generator, device, options)
    return moved, spike, blocks


def _check_rtn(spike: SpikeConfig, options: RotatedOptions | None) -> None:
    """Refuse what only the rotated pipeline fills; left at its initial values it would be wrong."""
    fields = {
        "rotation": spike.rotation is not Rotation.NONE,
        "input_offset": spike.input_offset,
        "query_groups": spike.query_groups,
        "options": options is not None,
    }
    wrong = [name for name, given in fields.items() if given]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: only the rotated pipeline makes use of this; "
            "convert with pipeline='rotated'."
        )


def _stored(name: str, tensor: Tensor, source: Source) -> Tensor:
    """Norms and biases in the model's dtype; integers, scales, offsets and rotations as they are."""
    if not tensor.is_floating_point() or name.rpartition(".")[2].startswith(FLOAT32_BUFFERS):
        return tensor
    return tensor.to(source.tensor("model.norm.weight").dtype)


def _finite(source: Source, name: str) -> dict[str, Tensor]:
    """A tensor outside of the blocks, by its name; ValueError if it holds NaN or infinity."""
    tensor = source.tensor(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinite values; the source is broken.")
    return {name: tensor}


def _converted_weights(block: nn.Module) -> int:
    modules = [m for _, m in spiking_modules(block) if isinstance(m, SpikingLinear)]
    return sum(m.in_features * m.out_features for m in modules if hasattr(m, "weight_codes"))


def _finish(
    folder: Path,
    writer: ShardWriter,
    source: Source,
    spike: SpikeConfig,
    provenance: dict[str, Any],
) -> int:
    writer.add(_finite(source, "model.norm.weight"))
    if not source.config.tie_word_embeddings:
        writer.add(_finite(source, "lm_head.weight"))
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
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source tree"


@dataclass(frozen=True)
class Estimate:
    """What a conversion will need, before it is started.

    Attributes:
        seconds: Estimated wall time on this machine.
        memory_mib: Estimated peak resident memory, MiB.
        disk_mib: Estimated size of the checkpoint, MiB.
    """

    seconds: float
    memory_mib: float
    disk_mib: float


def estimate(
    source: Source,
    spike: SpikeConfig,
    windows: int,
    window: int,
    pipeline: Pipeline | str = Pipeline.RTN,
) -> Estimate:
    """Estimate time, memory and disk of `convert` from shapes and a short timing of a matmul.

    Passes over every block (two for `rtn`, eight for `rotated`, which rounds the weights six times
    besides), the second moments of its inputs, and float attention; measured against a float32 matmul
    on this machine. Expect a factor of two.
    """
    c = source.config
    hidden, inner, tokens = c.hidden_size, c.intermediate_size, windows * window
    head_dim = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    heads = head_dim * (c.num_attention_heads + c.num_key_value_heads)
    weights = 2 * hidden * heads + 3 * hidden * inner
    moments = 3 * hidden**2 + inner**2
    attention = 6 * hidden * window
    rotates = Pipeline(pipeline) is Pipeline.ROTATED
    passes, rounding = (8, 12 * weights * hidden) if rotates else (2, 0)
    forward = tokens * (passes * weights + moments + min(passes, 4) / 2 * attention)
    flops = (forward + rounding) * c.num_hidden_layers * 2
    probe = torch.randn(512, hidden)
    square = torch.randn(hidden, hidden)
    probe @ square
    start = time.perf_counter()
    for _ in range(4):
        probe @ square
    rate = 4 * 2.0 * 512 * hidden * hidden / (time.perf_counter() - start)
    element = source.tensor("model.norm.weight").element_size()
    tables = 1 if c.tie_word_embeddings and not rotates else 2  # a rotated head is its own table
    table = c.vocab_size * hidden * element * tables
    bits = spike.weight_bits if spike.weight_bits != FLOAT_BITS else 8 * element
    disk = table + weights * bits / 8 * c.num_hidden_layers
    resident = weights * 4 * 3 + moments * 4 + 3 * tokens * hidden * 4 + table + min(disk, 1 << 30)
    loaded = disk * 8 if isinstance(source, ModelSource) else 0.0
    return Estimate(flops / rate, peak_mib() + (resident + loaded) / 2**20, disk / 2**20)


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
