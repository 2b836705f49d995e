"""The inputs of the linears of a block, in the order of execution, and what the linears should write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snnllm.config import SpikeConfig
from snnllm.linear import SpikingLinear
from snnllm.pipelines.batches import Batches
from snnllm.pipelines.fitting import SAMPLE_ROWS
from snnllm.pipelines.stages import StagedBlock
from snnllm.pipelines.streaming import INPUT_GROUPS, linear_of

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Linears that write to the residual stream."""


@dataclass(frozen=True)
class InputData:
    """What linears that share an input read, and what they should write; a batch at a time.

    Attributes:
        inputs: `[b, S, K]` per batch.
        weights: Token weights `[b S]` per batch.
        outputs: Wanted outputs `[b S, N]` of a batch, N over all the linears.
    """

    inputs: Batches
    weights: list[Tensor]
    outputs: Callable[[int], Tensor]

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs `[tokens, K]` on the device, and token weights."""
        for x, weight in zip(self.inputs, self.weights, strict=True):
            yield x.to(weight.device).flatten(0, 1), weight

    def encoder_inputs(self, module: SpikingLinear) -> Iterator[tuple[Tensor, Tensor]]:
        """What the encoder of a linear sees, `[tokens, K]`, and token weights."""
        for x, weight in self.rows():
            yield module.encoder_input(x).float(), weight

    def sample(self, module: SpikingLinear) -> tuple[Tensor, Tensor]:
        """About `SAMPLE_ROWS` tokens of `encoder_inputs`, spread over all batches."""
        total = sum(len(w) for w in self.weights)
        generator = torch.Generator().manual_seed(0)
        kept = (torch.rand(total, generator=generator) * total < SAMPLE_ROWS).split(
            [len(w) for w in self.weights]
        )
        parts = [
            (x[k.to(x.device)], w[k.to(w.device)])
            for k, (x, w) in zip(kept, self.encoder_inputs(module), strict=True)
        ]
        return torch.cat([x for x, _ in parts]), torch.cat([w for _, w in parts])


def stage_of(index: int, paths: Sequence[str]) -> str:
    """What `Run.on_stage` is told before linears of a block are converted."""
    return f"block {index}: {', '.join(path.rpartition('.')[2] for path in paths)}"


def each_input(
    spiking: StagedBlock, floating: StagedBlock, index: int, spike: SpikeConfig
) -> Iterator[tuple[list[str], InputData]]:
    """The inputs of a block one after the other; the caller converts their linears before the next.

    Args:
        spiking: The block that is converted, on the converted stream.
        floating: The float block on its own stream; gives the wanted outputs.
        index: Of the block.
        spike: Says which linears stay dense.

    Yields:
        Paths of the linears to convert, which share an input, and their data.
    """
    for paths in INPUT_GROUPS:
        writes = paths[0] in WRITERS
        inputs, targets = spiking.inputs(paths[0]), floating.inputs(paths[0])
        before = spiking.residual
        if writes:
            floating.write(paths[0], targets)
        kept = spike.modules_to_not_convert
        converted = [p for p in paths if not f"model.layers.{index}.{p}".endswith(kept)]
        if converted:
            dense = [linear_of(floating.block, p) for p in converted]
            device = dense[0].weight.device

            def outputs(
                batch: int,
                dense: list[nn.Linear] = dense,
                wanted: Batches | None = floating.residual if writes else None,
                before: Batches = before,
                targets: Batches = targets,
            ) -> Tensor:
                device = dense[0].weight.device
                if wanted is not None:
                    return (wanted[batch].to(device) - before[batch].to(device)).flatten(0, 1)
                x = targets[batch].to(device).flatten(0, 1)
                with torch.no_grad():
                    return torch.cat([linear(x) for linear in dense], dim=1)

            weights = [token_weights(paths[0], r).to(device) for r in before]
            yield converted, InputData(inputs, weights, outputs)
        if writes:
            spiking.write(paths[0], inputs)


def bias_of(linear: nn.Linear) -> Tensor:
    """Bias of a dense linear in float32, `[N]`; zeros if it has none."""
    bias: Tensor | None = linear.bias
    if bias is None:
        return linear.weight.new_zeros(linear.out_features)
    return bias.detach().float()


def token_weights(path: str, hidden: Tensor) -> Tensor:
    """How much an error of a linear's output matters at each token, `[tokens]`.

    What o_proj and down_proj write is divided by the size of the residual stream at the next norm. A
    few tokens have massive activations there; unweighted, they alone would decide how the weights
    are rounded, though an error at them is the one that matters least.

    Args:
        path: The linear in its block.
        hidden: Residual stream that it writes to, `[b, tokens, hidden]`.
    """
    if path not in WRITERS:
        return hidden.new_ones(hidden.shape[:-1].numel(), dtype=torch.float32)
    mean_square = hidden.float().square().mean(-1).flatten()
    return 1.0 / (mean_square + 1e-6 * mean_square.mean() + 1e-12)
