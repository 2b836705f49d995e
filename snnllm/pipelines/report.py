"""What converting a block did: signal to noise, spike rate, time and memory."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnllm.config import FLOAT_BITS, SpikeConfig
from snnllm.execution import spiking_modules
from snnllm.linear import SpikingLinear


@dataclass(frozen=True)
class BlockReport:
    """What converting one block did.

    Attributes:
        index: Block number.
        sqnr_db: Signal to quantisation noise of the block output, dB: against the float block on the
            same (converted) input (`rtn`), or against the float model (`rotated`).
        spike_rate: Signed events per neuron and possible event, `mean |q - z| / qmax`, in [0, 1];
            None where no linear has spiking inputs.
        seconds: Wall time of the block.
        peak_mib: Peak resident memory of the process so far, MiB.
        device_mib: Peak memory of the accelerator so far, MiB; 0 on the CPU.
        loss_before: Calibration loss before training; None where nothing is trained.
        loss_after: The same after it.
        step_ms: Mean time of a training step, ms.
        weight_columns: `[[T, columns], ...]` of the ternary linears, by their path in the block.
    """

    index: int
    sqnr_db: float
    spike_rate: float | None
    seconds: float
    peak_mib: float
    device_mib: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None
    step_ms: float | None = None
    weight_columns: Mapping[str, list[list[int]]] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for the log."""
        loss = ""
        if self.loss_before is not None and self.loss_after is not None:
            loss = f"loss {self.loss_before:.4g} -> {self.loss_after:.4g}, {self.step_ms:.1f} ms a step, "
        rate = "" if self.spike_rate is None else f"spike rate {self.spike_rate:.4f}, "
        device = f", device {self.device_mib:.0f} MiB" if self.device_mib else ""
        return (
            f"block {self.index}: {loss}SQNR {self.sqnr_db:.2f} dB, {rate}{self.seconds:.1f} s, "
            f"peak {self.peak_mib:.0f} MiB{device}"
        )


class SpikeRateMeter:
    """Measure the mean spike rate of a block's linears while it runs; calling it gives the rate.

    None if no linear has spiking inputs.
    """

    def __init__(self, block: nn.Module) -> None:
        self._modules = [m for _, m in spiking_modules(block) if isinstance(m, SpikingLinear)]
        self._events = self._possible = 0.0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Callable[[], float | None]:
        for module in self._modules:
            if module.layout.activation_bits != FLOAT_BITS:
                self._hooks.append(module.register_forward_pre_hook(self._count))
        return lambda: self._events / self._possible if self._possible else None

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, SpikingLinear)
        if self._possible > 0 and module is self._modules[0]:
            self.__exit__()  # one window is enough
            return
        encoder = module.encoder
        rows = module.encoder_input(inputs[0].reshape(-1, module.in_features))
        self._events += float(encoder.centre(encoder.encode(rows)).abs().sum())
        capacity = torch.tensor(encoder.capacities)[encoder.channel_group.long().cpu()].sum()
        self._possible += float(capacity) * rows.shape[0]


def with_weight_columns(spike: SpikeConfig, reports: Sequence[BlockReport]) -> SpikeConfig:
    """The configuration with what the blocks report about their ternary linears."""
    columns: dict[str, Any] = dict(spike.weight_columns)
    for report in reports:
        prefix = f"model.layers.{report.index}."
        columns |= {prefix + path: found for path, found in report.weight_columns.items()}
    return dataclasses.replace(spike, weight_columns=columns)


def sqnr_db(target: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """`10 log10(sum target^2 / sum (target - actual)^2)` in dB over all windows."""
    signal = noise = 0.0
    for t, a in zip(target, actual, strict=True):
        signal += float(t.double().square().sum())
        noise += float((t - a.to(t.device)).double().square().sum())
    return float("inf") if noise == 0 else 10.0 * float(torch.log10(torch.tensor(signal / noise)))


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0**2 if sys.platform == "darwin" else 1024.0)


def device_mib(device: torch.device) -> float:
    """Peak memory of an accelerator in this process, MiB; 0 for the CPU."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_allocated(device) / 2**20
