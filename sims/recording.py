"""Record spikes and membranes of chosen neurons while a spiking LLaMA reads a prompt.

SpikingJelly's monitors sit on the neurons of the chosen layers (``encoder.node``) and keep the
chosen tokens and channels only, so that memory stays bounded; what a run will need is computed
before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based import monitor
from torch import Tensor, nn

from neurons import Encoding
from sims.probes import observed
from sims.selection import Selection, Site, find_sites, parse_indices, select_channels
from sims.traces import LayerTrace, Recording
from snnllm.execution import View, use_view

__all__ = ["DEFAULT_MEMORY_LIMIT", "LayerPlan", "Recorder", "format_bytes", "record"]

DEFAULT_MEMORY_LIMIT = 256 * 2**20
"""Bytes a recording may need: 256 MiB."""


@dataclass(frozen=True)
class LayerPlan:
    """Which neurons of a layer will be recorded, and what that costs.

    Attributes:
        site: The layer.
        channels: Channel numbers, ascending.
        tokens: Number of recorded tokens N.
        prompt: Number of tokens of the prompt S.
    """

    site: Site
    channels: tuple[int, ...]
    tokens: int
    prompt: int

    @property
    def time_steps(self) -> int:
        """T, steps of the neurons of this layer."""
        return max(self.site.encoder.steps)

    @property
    def kept_bytes(self) -> int:
        """What stays: a spike (1 byte) and a membrane (4) per step, a charge (4), s and z (12)."""
        neurons = self.tokens * len(self.channels)
        groups = max(1, self.site.heads) * len(self.site.encoder.steps)
        return neurons * (5 * self.time_steps + 4) + 12 * self.tokens * groups

    @property
    def passing_bytes(self) -> int:
        """The membranes of the whole layer, there for a moment while the chosen ones are copied."""
        whole = self.prompt * len(self.site.channel_group)
        return 4 * self.time_steps * (whole + self.tokens * len(self.channels))


@dataclass
class _Tape:
    """Everything that one run leaves of one layer."""

    monitors: dict[str, monitor.BaseMonitor] = field(default_factory=dict)
    parameters: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, key: str, name: str) -> Tensor:
        records = self.monitors[key].records
        if len(records) != 1:
            raise RuntimeError(
                f"{name} ran {len(records)} times in one pass over the prompt, expected once; "
                "call the model with the whole prompt and without a cache."
            )
        taken: Tensor = records[0]
        return taken


class Recorder:
    """Record chosen neurons of a spiking LLaMA.

    Args:
        model: A spiking LLaMA; it keeps its view and its ``store_v_seq`` settings.
        layers: Shell-style patterns of layer names, such as ``model.layers.0.*``.
        tokens: Positions in the prompt, see `sims.selection.parse_indices`.
        channels: Channels, see `sims.selection.select_channels`; read for each layer.
        memory_limit: Bytes that a run may need, see `bytes_needed`.

    Raises:
        ValueError: No layer matches, a channel does not exist, no layer has such channels, or the
            limit is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "*",
        tokens: Selection = None,
        channels: Selection = None,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
    ) -> None:
        if memory_limit < 1:
            raise ValueError(f"The memory limit must be at least 1 byte, got {memory_limit}.")
        self.model, self.memory_limit = model, memory_limit
        self._tokens = tokens
        chosen = [(s, tuple(select_channels(channels, s))) for s in find_sites(model, layers)]
        # A pattern may cover Q, which has no salient channels; the rest is still recorded.
        self._chosen = [(site, numbers) for site, numbers in chosen if numbers]
        if not self._chosen:
            raise ValueError(
                f"None of the {len(chosen)} chosen layers has {channels} channels (salient ones "
                "need a conversion with T > 1); choose other layers, or all channels."
            )

    def plan(self, prompt: int) -> list[LayerPlan]:
        """What a run over a prompt of `prompt` tokens will record."""
        tokens = len(self.token_positions(prompt))
        return [LayerPlan(site, channels, tokens, prompt) for site, channels in self._chosen]

    def token_positions(self, prompt: int) -> list[int]:
        """Positions of the tokens to record in a prompt of `prompt` tokens.

        Raises:
            ValueError: A position outside of the prompt.
        """
        return parse_indices(self._tokens, prompt, "token", f"The prompt of {prompt} tokens")

    def bytes_needed(self, prompt: int) -> int:
        """Bytes for `prompt` tokens: the recording, and the largest layer whole for a moment."""
        plans = self.plan(prompt)
        return sum(p.kept_bytes for p in plans) + max(p.passing_bytes for p in plans)

    def check_memory(self, prompt: int) -> None:
        """Refuse a recording that does not fit.

        Raises:
            ValueError: It needs more than the memory limit; says what takes the space.
        """
        needed = self.bytes_needed(prompt)
        if needed <= self.memory_limit:
            return
        plans = self.plan(prompt)
        largest = max(plans, key=lambda plan: plan.kept_bytes)
        raise ValueError(
            f"The recording needs {format_bytes(needed)}, more than the memory limit of "
            f"{format_bytes(self.memory_limit)}: {len(plans)} layers x {largest.tokens} tokens "
            f"x up to {len(largest.channels)} channels x {largest.time_steps} steps. Choose fewer "
            "layers, tokens or channels, or raise the limit."
        )

    def run(self, input_ids: Tensor, token_text: Sequence[str] = ()) -> Recording:
        """Run the model over a prompt in the unrolled view and record.

        Args:
            input_ids: Token ids of one prompt, ``[S]`` or ``[1, S]``.
            token_text: Text of every token of the prompt, for labels; S strings or none.

        Returns:
            The recording.

        Raises:
            ValueError: A bad prompt, a token that does not exist, too much memory, or a model that
                cannot run the unrolled view.
        """
        ids = _check_prompt(self.model, input_ids, token_text)
        self.check_memory(ids.numel())
        positions = self.token_positions(ids.numel())
        plans = self.plan(ids.numel())
        with use_view(self.model, View.UNROLLED), ExitStack() as stack:
            tapes = [stack.enter_context(_recording(p, positions)) for p in plans]
            with torch.no_grad():
                self.model(input_ids=ids[None], use_cache=False)
        traces = [_trace(p, tape) for p, tape in zip(plans, tapes, strict=True)]
        return Recording(
            layers={trace.name: trace for trace in traces},
            tokens=np.array(positions, dtype=np.int64),
            input_ids=ids.cpu().numpy(),
            metadata=self._metadata(),
            token_text=tuple(token_text[n] for n in positions) if token_text else (),
        )

    def _metadata(self) -> dict[str, Any]:
        spike = getattr(getattr(self.model, "config", None), "spike", None)
        return {
            "view": str(View.UNROLLED),
            "model": str(getattr(getattr(self.model, "config", None), "_name_or_path", "")),
            "spike_config": None if spike is None else spike.to_dict(),
            "torch": str(torch.__version__),
        }


def record(
    model: nn.Module,
    input_ids: Tensor,
    layers: str | Sequence[str] = "*",
    tokens: Selection = None,
    channels: Selection = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    token_text: Sequence[str] = (),
) -> Recording:
    """Record chosen neurons while the model reads a prompt; arguments as in `Recorder`.

    Raises:
        ValueError: As `Recorder` and `Recorder.run`.
    """
    return Recorder(model, layers, tokens, channels, memory_limit).run(input_ids, token_text)


def format_bytes(count: int) -> str:
    """Bytes for people: ``1.5 MiB``."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _check_prompt(model: nn.Module, input_ids: Tensor, token_text: Sequence[str]) -> Tensor:
    ids = input_ids[0] if input_ids.dim() == 2 and len(input_ids) == 1 else input_ids
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(
            f"Expected token ids of one prompt, [S] or [1, S], got {input_ids.dtype} of shape "
            f"{list(input_ids.shape)}; record prompts one by one."
        )
    if ids.numel() == 0:
        raise ValueError("The prompt has no tokens; give at least one.")
    if token_text and len(token_text) != ids.numel():
        raise ValueError(f"Got {len(token_text)} token texts for {ids.numel()} tokens.")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if int(ids.min()) < 0 or (vocabulary is not None and int(ids.max()) >= vocabulary):
        raise ValueError(
            f"Token ids {int(ids.min())}..{int(ids.max())} do not fit the model's vocabulary of "
            f"{vocabulary}; use the tokenizer that belongs to the model."
        )
    return ids.to(next(model.parameters()).device, torch.int64)


def _by_token(values: Tensor, heads: int) -> Tensor:
    """Bring a layer's values to ``[S, H, *]``: from ``[1, H, S, *]``, or ``[.., *]`` with H = 1."""
    if heads:
        return values[0].transpose(0, 1)
    return values.reshape(-1, 1, values.shape[-1])


@contextmanager
def _recording(plan: LayerPlan, positions: list[int]) -> Iterator[_Tape]:
    """Put monitors on the neurons of one layer, and take them off again."""
    site, node = plan.site, plan.site.encoder.node
    rows, columns = torch.tensor(positions), torch.tensor(plan.channels)
    choose = _chooser(site, rows, columns)

    def keep_membrane(v_seq: Tensor) -> Tensor:
        kept = choose(v_seq)
        node.v_seq = None  # or every chosen layer would keep all of its membranes until the end
        return kept

    def keep_parameters(_: Tensor, result: tuple[Tensor, Encoding]) -> None:
        pair = (result[1].threshold, result[1].zero_point)
        s, z = (_by_token(p, site.heads)[rows.to(p.device)].cpu() for p in pair)
        tape.parameters.append((s, z))

    tape, before = _Tape(), node.store_v_seq
    node.store_v_seq = True
    with ExitStack() as stack:
        stack.callback(setattr, node, "store_v_seq", before)
        for key, made in (
            ("spikes", monitor.OutputMonitor(node, None, lambda s: choose(s).to(torch.uint8))),
            ("v_after_reset", monitor.AttributeMonitor("v_seq", False, node, None, keep_membrane)),
            ("charge", monitor.InputMonitor(node, None, lambda x: choose(x[:1])[0])),
        ):
            tape.monitors[key] = stack.enter_context(made)
        stack.enter_context(observed(site.encoder, "encode_spikes", keep_parameters))
        yield tape


def _chooser(site: Site, rows: Tensor, columns: Tensor) -> Callable[[Tensor], Tensor]:
    def choose(sequence: Tensor) -> Tensor:
        """Copy the chosen neurons of ``[T, *]`` to the CPU, ``[T, N, C]``."""
        device = sequence.device
        steps = []
        for step in sequence:
            tokens = _by_token(step, site.heads)[rows.to(device)].flatten(1)
            steps.append(tokens[:, columns.to(device)].cpu())
        return torch.stack(steps)

    return choose


def _trace(plan: LayerPlan, tape: _Tape) -> LayerTrace:
    site = plan.site
    arrays = {key: tape.take(key, site.name).numpy() for key in tape.monitors}
    threshold, zero_point = tape.parameters[0]
    channels = np.array(plan.channels, dtype=np.int64)
    group = site.channel_group.cpu().numpy()[channels]
    per_head = len(site.channel_group) // max(1, site.heads)
    return LayerTrace(
        name=site.name,
        levels=site.encoder.levels,
        channels=channels,
        channel_group=group,
        channel_head=channels // per_head,
        steps=np.array(site.encoder.steps, dtype=np.int64)[group],
        threshold=threshold.numpy(),
        zero_point=zero_point.numpy().astype(np.int64),
        **arrays,
    )
