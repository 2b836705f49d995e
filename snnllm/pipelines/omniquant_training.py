"""Training one block: windows in batches, no waiting for the device inside of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snnllm.pipelines.batches import Batches, window
from snnllm.pipelines.omniquant_block import TrainableBlock
from snnllm.pipelines.omniquant_options import Execution, Loss, OmniQuantOptions

_MEASURED = 8
"""Windows on which the loss is measured before and after the training."""
_WARM_UP = 3


@dataclass(frozen=True)
class Samples:
    """Inputs of a block and what it should give, per batch of windows.

    Attributes:
        inputs: Hidden states of the converted stream in front of the block.
        targets: Hidden states of the full-precision stream behind it.
        second: Outputs of the dense block on `inputs`, or None without a second loss.
        context: Cosines, sines and mask, as `TrainableBlock.forward` takes them.
        device: Where the block is.
    """

    inputs: Batches
    targets: Batches
    second: Batches | None
    context: tuple[Tensor, Tensor, Tensor]
    device: torch.device

    def places(self) -> list[tuple[int, int]]:
        """Batch and row of every window."""
        return [(b, row) for b, batch in enumerate(self.inputs) for row in range(len(batch))]

    def take(self, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and second targets of some windows, `[n, S, hidden]` on the device."""

        def some(batches: Batches) -> Tensor:
            parts = [window(batches, *place) for place in places]
            return torch.cat(parts).to(self.device, non_blocking=True)

        second = None if self.second is None else some(self.second)
        return some(self.inputs), some(self.targets), second


@dataclass(frozen=True)
class Trained:
    """What training did: mean loss of some windows before and after, and the time of a step, ms."""

    before: float
    after: float
    step_ms: float


def block_loss(options: OmniQuantOptions, out: Tensor, target: Tensor) -> Tensor:
    """Distance of hidden states `[B, S, hidden]` from their target, a scalar."""
    error = (out - target).square().mean(-1)
    if options.loss is Loss.RELATIVE:
        size = target.square().mean(-1)
        error = error / (size + 1e-6 * size.mean() + 1e-12)
    return error.mean()


def train(
    block: TrainableBlock,
    samples: Samples,
    generator: torch.Generator,
    name: str,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Trained:
    """Learn everything in `block` that has a learning rate.

    Args:
        block: The block, on its device.
        samples: What it reads and should give.
        generator: Order of the windows.
        name: Block name for messages.
        on_stage: Told which epoch comes next, for progress.

    Raises:
        FloatingPointError: The loss is NaN or infinite.
    """
    options, places = block.options, samples.places()
    measured = places[:: max(1, len(places) // _MEASURED)][:_MEASURED]
    before = _measure(block, samples, measured)
    _check(before, name, "before training")
    start, steps = time.perf_counter(), 0
    with _fast_matmuls(samples.device):
        trainer = Trainer(block, samples, math.ceil(len(places) / options.batch))
        for epoch in range(options.epochs):
            on_stage(f"{name}: epoch {epoch + 1} of {options.epochs}")
            order = torch.randperm(len(places), generator=generator).tolist()
            for first in range(0, len(order), options.batch):
                trainer.run([places[i] for i in order[first : first + options.batch]])
                steps += 1
            _check(trainer.epoch_loss(), name, f"in epoch {epoch + 1}")
    seconds = time.perf_counter() - start
    after = _measure(block, samples, measured)
    _check(after, name, "after training")
    return Trained(before, after, 1000.0 * seconds / max(1, steps))


class Trainer:
    """Optimiser and training step of one block.

    Args:
        block: The block.
        samples: What it reads and should give.
        steps: Training steps of an epoch.
    """

    def __init__(self, block: TrainableBlock, samples: Samples, steps: int) -> None:
        self._block, self._samples, options = block, samples, block.options
        self._cuda = samples.device.type == "cuda"
        automatic = options.execution is Execution.AUTO and self._cuda
        self._graphs = automatic or options.execution is Execution.GRAPH
        if self._graphs and not self._cuda:
            raise ValueError("execution='graph' records CUDA graphs; on the CPU use 'eager'.")
        self._rates = _rates(block)
        self._optimizer = self._new_optimizer()
        self._total, self._done = max(1, steps * options.epochs), 0
        self._sum = torch.zeros((), device=samples.device)
        self._count = 0
        self._forward: Callable[..., Tensor] = block
        if options.execution is Execution.COMPILED:
            self._forward = torch.compile(block)
        self._recorded: dict[int, Recording] = {}

    def _new_optimizer(self) -> torch.optim.Optimizer:
        groups = [
            # A rate on the device can change without recording the step anew.
            {
                "params": params,
                "lr": torch.tensor(rate, device=self._samples.device) if self._graphs else rate,
            }
            for params, rate in self._rates
        ]
        if not groups:
            raise ValueError("Nothing is learned: every learning rate is 0. Use epochs=0 for that.")
        return torch.optim.AdamW(
            groups, weight_decay=0.0, fused=self._cuda, capturable=self._graphs
        )

    def run(self, places: list[tuple[int, int]]) -> None:
        """One step on some windows."""
        self._schedule()
        inputs, target, second = self._samples.take(places)
        if self._graphs:
            if len(inputs) not in self._recorded:
                self._recorded[len(inputs)] = Recording(self, inputs, target, second)
            self._recorded[len(inputs)].replay(inputs, target, second)
        else:
            self.step(inputs, target, second)
        self._count += 1
        self._done += 1

    def step(self, inputs: Tensor, target: Tensor, second: Tensor | None) -> None:
        """Forward, backward, update; sums the loss up on the device."""
        options = self._block.options
        out = self._forward(inputs, *self._samples.context)
        loss = block_loss(options, out, target)
        if second is not None:
            loss = loss + options.second_loss * block_loss(options, out, second)
        self._optimizer.zero_grad(set_to_none=not self._graphs)
        loss.backward()
        self._optimizer.step()
        self._block.floor_scales()
        self._sum += loss.detach()

    def _schedule(self) -> None:
        if not self._block.options.decay:
            return
        factor = 0.5 * (1.0 + math.cos(math.pi * self._done / self._total))
        for group, (_, rate) in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def epoch_loss(self) -> float:
        """Mean loss since the last call; the only number that is read back."""
        mean = float(self._sum) / max(1, self._count)
        self._sum.zero_()
        self._count = 0
        return mean

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo what the steps inside the `with` block have learned."""
        params = [p for params, _ in self._rates for p in params]
        before, total = [p.detach().clone() for p in params], self._sum.clone()
        state = {
            p: {k: v.clone() for k, v in self._optimizer.state[p].items()}
            for p in params
            if p in self._optimizer.state
        }
        yield
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
            for p in params:
                for key, value in self._optimizer.state[p].items():
                    value.copy_(state[p][key]) if p in state else value.zero_()
            self._sum.copy_(total)


class Recording:
    """A training step as a CUDA graph over fixed inputs of one batch size.

    Args:
        trainer: Whose step is recorded; its values are the same afterwards.
        inputs: A batch, for its shape.
        target: Likewise.
        second: Likewise, or None.
    """

    def __init__(
        self, trainer: Trainer, inputs: Tensor, target: Tensor, second: Tensor | None
    ) -> None:
        self._slots = (inputs.clone(), target.clone(), None if second is None else second.clone())
        self._graph = torch.cuda.CUDAGraph()
        with trainer.unchanged():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    trainer.step(*self._slots)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                trainer.step(*self._slots)

    def replay(self, *batch: Tensor | None) -> None:
        """Run the step on a batch."""
        for slot, tensor in zip(self._slots, batch, strict=True):
            if slot is not None and tensor is not None:
                slot.copy_(tensor)
        self._graph.replay()


def _rates(block: TrainableBlock) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters and their learning rates; what has rate 0 is left out."""
    options = block.options
    scales, clips, found = [], [], []
    for name, parameter in block.named_parameters():
        if name.endswith(("logit", "upper", "lower")):
            clips.append(parameter)
        elif not name.endswith("weight"):
            scales.append(parameter)
        elif options.weight_rate > 0:
            rate = options.weight_rate * float(parameter.detach().std())
            found.append(([parameter], rate))
    found += [(scales, options.scale_rate), (clips, options.clip_rate)]
    return [(params, rate) for params, rate in found if params and rate > 0]


@torch.no_grad()
def _measure(block: TrainableBlock, samples: Samples, places: list[tuple[int, int]]) -> float:
    """Mean loss on some windows."""
    total = torch.zeros((), device=samples.device)
    for place in places:
        inputs, target, _ = samples.take([place])
        total += block_loss(block.options, block(inputs, *samples.context), target)
    return float(total) / max(1, len(places))


def _check(loss: float, name: str, when: str) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{name}: the loss is {loss} {when}. The blocks before are kept; try smaller learning "
            "rates (scale_rate, clip_rate, weight_rate) or low_precision=False with --restart."
        )


@contextmanager
def _fast_matmuls(device: torch.device) -> Iterator[None]:
    """TF32 for the float32 matmuls of the training; statistics and spiking keep full precision."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
