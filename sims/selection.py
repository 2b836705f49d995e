"""What to record: layers by name, tokens and channels by number; errors list what exists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from neurons import SpikeEncoder
from snnllm.attention import SpikingLlamaAttention
from snnllm.config import FLOAT_BITS
from snnllm.linear import SpikingLinear

__all__ = ["Selection", "Site", "find_sites", "parse_indices", "select_channels"]

Selection = str | Sequence[int] | None
"""Numbers, or text such as ``"0,3,8:16,-1"``, or ``"all"`` (also None)."""

_AUTO = re.compile(r"^auto(?::(\d+))?$")
_AUTO_COUNT = 6
_RANGE = re.compile(r"^(-?\d+)?:(-?\d+)?$")


@dataclass(frozen=True)
class Site:
    """A layer whose neurons can be recorded: the input of a linear, or Q, K or V of an attention.

    Attributes:
        name: As in ``model.named_modules()``: the linear, or the encoder of the attention.
        encoder: Its encoder; the neurons are ``encoder.node``.
        heads: Heads H of an attention operand ``[1, H, S, D]``; 0 for a linear's input ``[.., C]``.
        channel_group: Saliency group of every channel, uint8 ``[C]``; with heads C = H * D, head
            by head.
    """

    name: str
    encoder: SpikeEncoder
    heads: int
    channel_group: Tensor

    @property
    def salient(self) -> Tensor:
        """Channels outside the ordinary group 0, bool ``[C]``."""
        return self.channel_group > 0


def _attention_sites(name: str, module: SpikingLlamaAttention) -> list[Site]:
    config: LlamaConfig = module.config
    heads: int = config.num_attention_heads
    groups = module.q_encoder.channel_group
    # Either all heads of Q share one group, or each has those of its KV head, `[H, D]`.
    groups = groups.repeat(heads) if groups.dim() == 1 else groups.flatten()
    sites = [Site(f"{name}.q_encoder", module.q_encoder, heads, groups)]
    for key in ("k_encoder", "v_encoder"):
        encoder: SpikeEncoder = getattr(module, key)
        group = encoder.channel_group
        sites.append(Site(f"{name}.{key}", encoder, len(group), group.flatten()))
    return sites


def all_sites(model: nn.Module) -> list[Site]:
    """Every layer of the model whose neurons can be recorded, in the order of its modules.

    Raises:
        ValueError: There is none.
    """
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, SpikingLlamaAttention):
            sites += _attention_sites(name, module)
        elif isinstance(module, SpikingLinear) and module.layout.activation_bits != FLOAT_BITS:
            sites.append(Site(name, module.encoder, 0, module.encoder.channel_group))
    if not sites:
        raise ValueError(
            "The model has no spiking activations to record: it is dense, or only its weights are "
            "low-bit. Convert it with activation bits, for example the preset W4A4T2."
        )
    return sites


def find_sites(model: nn.Module, patterns: str | Sequence[str]) -> list[Site]:
    """Choose layers by shell-style patterns, such as ``model.layers.0.*`` or ``*.down_proj``.

    Args:
        model: A spiking LLaMA.
        patterns: One pattern or several; ``*`` also matches dots.

    Returns:
        The layers that match a pattern, each once, in the order of the model.

    Raises:
        ValueError: A pattern matches nothing (the message lists the layers), or there is none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    sites = all_sites(model)
    if not patterns:
        raise ValueError(f"No layer was chosen. Layers: {_summary(sites)}.")
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ValueError(f"No spiking layer matches {pattern!r}. Layers: {_summary(sites)}.")
    return [s for s in sites if any(fnmatchcase(s.name, pattern) for pattern in patterns)]


def _summary(sites: list[Site]) -> str:
    """Layer names with the block numbers folded: ``model.layers.{0..29}.mlp.up_proj``."""
    blocks: dict[str, list[int]] = {}
    for site in sites:
        number = re.search(r"\.(\d+)\.", site.name)
        template = re.sub(r"\.\d+\.", ".#.", site.name, count=1)
        blocks.setdefault(template, []).append(int(number[1]) if number else 0)
    return ", ".join(
        name.replace("#", f"{{{min(n)}..{max(n)}}}" if len(n) > 1 else str(n[0]))
        for name, n in blocks.items()
    )


def parse_indices(selection: Selection, size: int, what: str, where: str) -> list[int]:
    """Read a selection of numbers in ``0..size-1``; negative numbers count from the end.

    Args:
        selection: Numbers, text like ``"0,3,8:16,-1"`` (``8:16`` is 8 to 15), ``"all"`` or None.
        size: How many there are.
        what: Names one of them in messages, ``"token"`` or ``"channel"``.
        where: Names all of them in messages, for example ``"the prompt"``.

    Returns:
        Ascending numbers, each once.

    Raises:
        ValueError: Text that is no selection, a number that does not exist, or nothing selected.
    """
    if selection is None or selection == "all":
        return list(range(size))
    chosen: set[int] = set()
    parts = selection.split(",") if isinstance(selection, str) else list(map(str, selection))
    for part in map(str.strip, parts):
        span = _RANGE.match(part)
        if span:
            start, stop = (None if s is None else int(s) for s in span.groups())
            chosen.update(range(size)[slice(start, stop)])
        elif re.fullmatch(r"-?\d+", part):
            chosen.add(_checked(int(part), size, what, where))
        else:
            raise ValueError(
                f"Cannot read {part!r} as a {what}; write numbers and ranges like 0,3,8:16,-1, or "
                "all."
            )
    if not chosen:
        raise ValueError(f"{selection!r} selects no {what} of {where}; 0..{size - 1} exist.")
    return sorted(chosen)


def _checked(number: int, size: int, what: str, where: str) -> int:
    if not -size <= number < size:
        raise ValueError(f"{where} has no {what} {number}; 0..{size - 1} exist.")
    return number % size


def select_channels(selection: Selection, site: Site) -> list[int]:
    """Choose channels of a layer.

    Args:
        selection: As in `parse_indices`, or ``"salient"``, ``"ordinary"``, or ``"auto:N"``: N
            channels spread evenly over the salient and the ordinary ones, half from each where
            there are enough (``"auto"``: 6).
        site: The layer.

    Returns:
        Ascending channel numbers; none if no channel of the layer is of the kind asked for.

    Raises:
        ValueError: As `parse_indices`.
    """
    salient: list[int] = torch.nonzero(site.salient).flatten().tolist()
    ordinary: list[int] = torch.nonzero(~site.salient).flatten().tolist()
    if selection in ("salient", "ordinary"):
        return salient if selection == "salient" else ordinary
    auto = _AUTO.match(selection) if isinstance(selection, str) else None
    if auto is None:
        return parse_indices(selection, len(site.channel_group), "channel", site.name)
    count = int(auto[1] or _AUTO_COUNT)
    if count < 1:
        raise ValueError(f"{selection!r} selects no channel; write auto:N with N >= 1.")
    few = min(len(salient), count // 2)
    few = max(few, min(len(salient), count - len(ordinary)))
    return sorted(spread(salient, few) + spread(ordinary, count - few))


def spread(numbers: list[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spaced."""
    if count >= len(numbers):
        return list(numbers)
    return [numbers[i * len(numbers) // count] for i in range(count)]
