"""Recordings of spiking layers: what the arrays mean, derived quantities, NPZ and CSV files.

Time runs inside a token: every token meets fresh neurons with ``v[-1] = z + 1/2``. For step t::

    v_before_fire[t] = v[t-1] + charge[t]      charge x/s comes at step 0, nothing after it
    spikes[t]        = clip(floor(v_before_fire[t]), 0, L-1), 0 after the last step of a channel
    v_after_reset[t] = v_before_fire[t] - spikes[t]

``v_after_reset`` (what SpikingJelly's ``v_seq`` holds) is the membrane AFTER fire and reset;
``v_before_fire`` is derived. All membranes and charges are in thresholds, float32.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CSV_COLUMNS", "LayerTrace", "Recording"]

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

CSV_COLUMNS = (
    "layer",
    "token",
    "channel",
    "step",
    "charge",
    "v_before_fire",
    "v_after_reset",
    "spike",
    "threshold",
    "zero_point",
    "salient",
)
_ARRAYS = (
    "channels",
    "channel_group",
    "channel_head",
    "steps",
    "spikes",
    "v_after_reset",
    "charge",
    "threshold",
    "zero_point",
)
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerTrace:
    """Recorded neurons of one layer: T steps, N tokens, C channels, H heads (1 without), G groups.

    Attributes:
        name: The layer.
        levels: L, a step fires 0..L-1 spikes.
        channels: Channel numbers, int64 ``[C]``.
        channel_group: Saliency group of each, uint8 ``[C]``; group 0 is the ordinary one.
        channel_head: Attention head of each, int64 ``[C]``.
        steps: Time steps in which each may fire, int64 ``[C]``.
        spikes: ``[T, N, C]``, uint8, graded: 0..L-1.
        v_after_reset: Membrane after fire and reset, ``[T, N, C]``, float32, in thresholds.
        charge: x / s, injected at step 0, ``[N, C]``, float32, in thresholds.
        threshold: s, firing threshold, ``[N, H, G]``, float32, in units of the activation.
        zero_point: z, bias charge, ``[N, H, G]``, int64, in thresholds.
    """

    name: str
    levels: int
    channels: Integers
    channel_group: NDArray[np.uint8]
    channel_head: Integers
    steps: Integers
    spikes: NDArray[np.uint8]
    v_after_reset: Floats
    charge: Floats
    threshold: Floats
    zero_point: Integers

    @property
    def salient(self) -> NDArray[np.bool_]:
        """Channels outside the ordinary group, ``[C]``."""
        return np.asarray(self.channel_group > 0)

    @property
    def capacity(self) -> Integers:
        """Largest spike count of each channel, ``T_c * (L-1)``, ``[C]``."""
        return np.asarray(self.steps * (self.levels - 1), dtype=np.int64)

    def per_channel(self, values: NDArray[Any]) -> NDArray[Any]:
        """Spread values per head and group ``[N, H, G]`` over the channels ``[N, C]``."""
        spread: NDArray[Any] = values[:, self.channel_head, self.channel_group]
        return spread

    @property
    def v_init(self) -> Floats:
        """Membrane before step 0, ``z + 1/2``, ``[N, C]``, in thresholds."""
        return self.per_channel(self.zero_point).astype(np.float32) + np.float32(0.5)

    @property
    def v_before_fire(self) -> Floats:
        """Charged membrane that decides the spikes, ``[T, N, C]``, float32, in thresholds."""
        before = np.concatenate([self.v_init[None], self.v_after_reset[:-1]])
        before[0] += self.charge
        return np.asarray(before, dtype=np.float32)

    @property
    def count(self) -> Integers:
        """Spike counts q, ``[N, C]``."""
        return np.asarray(self.spikes.sum(0, dtype=np.int64))

    @property
    def signed_spikes(self) -> Integers:
        """The train re-encoded around zero: ``|q - z|`` spikes of its sign, ``[T, N, C]``.

        The unsigned neuron fires about z times for an activation of zero; the signed one is silent.
        """
        centred = self.count - self.per_channel(self.zero_point)
        fired = np.arange(len(self.spikes))[:, None, None] * (self.levels - 1)
        graded = np.clip(np.abs(centred) - fired, 0, self.levels - 1)
        signed: Integers = np.sign(centred) * graded
        return signed


@dataclass(frozen=True)
class Recording:
    """Everything recorded in one run of a model.

    Attributes:
        layers: Traces by layer name.
        tokens: Positions of the recorded tokens, int64 ``[N]``.
        input_ids: Token ids of the whole prompt, int64 ``[S]``.
        metadata: What was run, JSON-serialisable.
        token_text: Text of the recorded tokens, N strings.
    """

    layers: dict[str, LayerTrace]
    tokens: Integers
    input_ids: Integers
    metadata: dict[str, Any] = field(default_factory=dict)
    token_text: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """A label for each recorded token: its text, or its position."""
        return list(self.token_text) or [str(n) for n in self.tokens]

    @property
    def rows(self) -> int:
        """Rows of the CSV form, ``sum T * N * C``."""
        return sum(trace.spikes.size for trace in self.layers.values())

    def save(self, path: Path) -> None:
        """Write an NPZ file: arrays named ``layer/array``, and ``metadata`` as a JSON string."""
        header = {
            "format_version": _FORMAT_VERSION,
            "levels": {name: trace.levels for name, trace in self.layers.items()},
            "token_text": list(self.token_text),
            "units": {
                "v_after_reset": "thresholds, membrane after fire and reset",
                "charge": "thresholds, injected at step 0",
                "zero_point": "thresholds, v before step 0 is zero_point + 1/2",
                "threshold": "units of the activation",
            },
            **self.metadata,
        }
        arrays: dict[str, NDArray[Any]] = {
            f"{name}/{key}": getattr(trace, key)
            for name, trace in self.layers.items()
            for key in _ARRAYS
        }
        arrays["tokens"], arrays["input_ids"] = self.tokens, self.input_ids
        arrays["metadata"] = np.array(json.dumps(header))
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not such a file, or of another format version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            header = json.loads(str(arrays["metadata"]))
        except (zipfile.BadZipFile, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no recording of this package ({error}).") from error
        version = header.pop("format_version", None)
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"{path} has recording format {version}, this package reads {_FORMAT_VERSION}; "
                "record again."
            )
        header.pop("units")
        layers = {
            name: LayerTrace(name, levels, **{key: arrays[f"{name}/{key}"] for key in _ARRAYS})
            for name, levels in header.pop("levels").items()
        }
        text = tuple(header.pop("token_text"))
        return cls(layers, arrays["tokens"], arrays["input_ids"], header, text)

    def write_csv(self, path: Path, max_rows: int = 1_000_000) -> None:
        """Write the long form, one row per layer, token, channel and step (`CSV_COLUMNS`).

        ``charge`` and ``v_before_fire`` are before, ``v_after_reset`` is after the spikes of the
        step; floats are written so that they read back exactly.

        Raises:
            ValueError: There are more rows than `max_rows`.
        """
        if self.rows > max_rows:
            raise ValueError(
                f"The CSV would have {self.rows:,} rows, more than the limit of {max_rows:,}; "
                "choose fewer layers, tokens or channels, or raise the limit. The NPZ file holds "
                "the same data in far less space."
            )
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            for trace in self.layers.values():
                writer.writerows(_csv_rows(trace, self.tokens))

    def select(self, name: str) -> LayerTrace:
        """The trace of one layer.

        Raises:
            KeyError: It was not recorded; the message lists those that were.
        """
        if name not in self.layers:
            raise KeyError(f"{name!r} was not recorded; recorded: {', '.join(self.layers)}.")
        return self.layers[name]

    def with_metadata(self, **values: Any) -> Recording:
        """A recording with more metadata."""
        return dataclasses.replace(self, metadata={**self.metadata, **values})


def _csv_rows(trace: LayerTrace, tokens: Integers) -> list[tuple[Any, ...]]:
    before, threshold = trace.v_before_fire, trace.per_channel(trace.threshold)
    zero_point = trace.per_channel(trace.zero_point)
    salient = trace.salient.astype(int)
    rows = []
    for n, c, t in np.ndindex((*trace.charge.shape, len(trace.spikes))):
        rows.append(
            (
                trace.name,
                tokens[n],
                trace.channels[c],
                t,
                f"{trace.charge[n, c]:.9g}" if t == 0 else 0,
                f"{before[t, n, c]:.9g}",
                f"{trace.v_after_reset[t, n, c]:.9g}",
                trace.spikes[t, n, c],
                f"{threshold[n, c]:.9g}",
                zero_point[n, c],
                salient[c],
            )
        )
    return rows
