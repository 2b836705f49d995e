"""The lines of the tables, from the records of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from snnllm.energy import ENERGY_MODELS, Network
from snnllm.operation_report import FP16_ACE
from snnllm.paper.recipes import Line, Record, Row
from snnllm.zeroshot import ZERO_SHOT_TASKS

__all__ = [
    "ACCURACIES",
    "EFFICIENCY_FORMATS",
    "ablation_lines",
    "accuracy_lines",
    "efficiency_lines",
    "equivalence_lines",
    "find",
    "perplexities",
    "perplexity_lines",
    "speed_lines",
]

ACCURACIES = tuple(
    f"{task} {metric}" for task in (*ZERO_SHOT_TASKS, "mean") for metric in ("acc", "acc_norm")
)
_DENSE = {Network.DENSE_INT8: 8 * 8, Network.DENSE_FP16: FP16_ACE}
_SHOWN = (Network.SPIKING, Network.COLLAPSED, *_DENSE)
EFFICIENCY_FORMATS: Mapping[str, str] = {
    "mean steps": ".3f",
    "ACE % of fp16": ".3f",
    "SynOps / MAC": ".3f",
    "spike rate %": ".2f",
    "silent %": ".2f",
}


def find(record: Any, *path: str) -> Any:
    """A value inside nested mappings; None where any of them lacks its key."""
    for key in path:
        if not isinstance(record, Mapping) or key not in record:
            return None
        record = record[key]
    return record


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _start(row: Row, record: Record) -> Line:
    return {
        "method": row.label,
        "bits": row.bits,
        "mean steps": find(record, "model", "mean_steps"),
    }


def accuracy_lines(rows: Sequence[tuple[Row, Record]]) -> list[Line]:
    """Perplexity on every text and all accuracies, in per cent."""
    made = []
    for row, record in rows:
        line = _start(row, record) | perplexities(record, "perplexity")
        tasks = find(record, "measures", "tasks") or {}
        for score in tasks.get("scores", ()):
            for metric in ("acc", "acc_norm"):
                if metric in score["metrics"]:
                    line[f"{score['task']} {metric}"] = 100 * score["metrics"][metric]
        if tasks:
            for metric in ("acc", "acc_norm"):
                line[f"mean {metric}"] = _percent(tasks[f"mean_{metric}"])
        line["convert s"] = find(record, "conversion", "seconds")
        line["convert device MiB"] = find(record, "conversion", "device_mib") or None  # 0 on a CPU
        made.append(line)
    return made


def ablation_lines(rows: Sequence[tuple[Row, Record]]) -> list[Line]:
    """Perplexity on the sample, and what the conversion said about its blocks."""
    return [_start(row, r) | perplexities(r, "sample") | _conversion(r) for row, r in rows]


def perplexity_lines(rows: Sequence[tuple[Row, Record]]) -> list[Line]:
    """Perplexity on every text, and what the conversion said about its blocks and its time."""
    return [
        _start(row, r)
        | perplexities(r, "perplexity")
        | _conversion(r)
        | {
            "convert s": find(r, "conversion", "seconds"),
            "step ms": _mean(_of_blocks(r, "step_ms")),
            "evaluate s": find(r, "seconds", "perplexity"),
        }
        for row, r in rows
    ]


def perplexities(record: Record, measure: str) -> Line:
    """Perplexities of a measure, by the name of the text and the metric."""
    results = find(record, "measures", measure) or {}
    return {f"{name} {result['metric']}": result["perplexity"] for name, result in results.items()}


def _of_blocks(record: Record, field: str) -> list[float]:
    blocks = find(record, "conversion", "blocks") or []
    return [block[field] for block in blocks if block[field] is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _conversion(record: Record) -> Line:
    sqnr = _of_blocks(record, "sqnr_db")
    return {
        "SQNR dB, mean": _mean(sqnr),
        "SQNR dB, worst": min(sqnr, default=None),
        "spike rate %": _percent(_mean(_of_blocks(record, "spike_rate"))),
    }


def efficiency_lines(rows: Sequence[tuple[Row, Record]]) -> list[Line]:
    """The spiking and the collapsed execution of every row, then the dense rivals."""
    made: list[Line] = []
    rivals: list[Line] = []
    for row, record in rows:
        counted = find(record, "measures", "operations")
        line = _start(row, record) | perplexities(record, "sample")
        if counted is None:
            made.append(line)
            continue
        totals = counted["totals"]
        line |= {
            "execution": "spiking",
            "ACE % of fp16": _ace(counted["rows"]),
            "SynOps / MAC": totals["synaptic_operations"] / totals["macs"],
            "spike rate %": _percent(totals["spike_rate"]),
            "silent %": _percent(totals["silent_fraction"]),
        }
        energies = {n: _energies(counted, n) for n in _SHOWN}
        made.append(line | energies[Network.SPIKING])
        made.append(
            {"method": row.label, "bits": row.bits, "execution": "collapsed integers"}
            | energies[Network.COLLAPSED]
        )
        rivals = rivals or [
            {
                "method": str(n),
                "bits": "-",
                "execution": "dense",
                "ACE % of fp16": 100 * ace / FP16_ACE,
            }
            | energies[n]
            for n, ace in _DENSE.items()
        ]
    return [*made, *rivals]


def _ace(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the linears, in per cent of fp16."""
    linear = [row for row in rows if row["kind"] == "linear"]
    ace, macs = (sum(int(row[key]) for row in linear) for key in ("ace", "macs"))
    return 100 * ace / (FP16_ACE * macs)


def _energies(counted: Mapping[str, Any], network: Network) -> Line:
    """Total energy of a token under each model, uJ, and relative to dense int8 and fp16."""
    line: Line = {}
    for model in ENERGY_MODELS:
        name = model.provenance.name
        totals = {
            row["network"]: row["total_pj"]
            for row in counted["energy"]["rows"]
            if row["model"] == name
        }
        line[f"{name}, uJ a token"] = totals[network] * 1e-6 / counted["tokens"]
        for rival in _DENSE:
            line[f"{name}, of {rival}"] = totals[network] / totals[rival]
    return line


def equivalence_lines(rows: Sequence[tuple[Row, Record]]) -> list[Line]:
    """Integers compared and differing, differences of outputs and logits."""
    made = []
    for row, record in rows:
        found = find(record, "measures", "equivalence") or {}
        line: Line = {"method": row.label, "bits": row.bits}
        names = ("layers", "tokens", "compared", "differing", "outputs", "logits")
        line |= {name: found.get(name) for name in names}
        if found:
            line["views agree"] = "yes" if found["agrees"] else "no"
        made.append(line)
    return made


def speed_lines(rows: Sequence[tuple[Row, Record]]) -> list[Line]:
    """One line per contender: milliseconds, and how much faster than the dense float32 model."""
    made: list[Line] = []
    for row, record in rows:
        found = find(record, "measures", "speed")
        if found is None:
            made.append({"method": row.label, "bits": row.bits})
            continue
        base = next(iter(found["timings"].values()))
        for name, timing in found["timings"].items():
            line = {"method": row.label, "bits": row.bits, "runs": name}
            line |= {"prompt": found["prompt"], "context": found["context"]}
            for what, header in (("prefill", "prefill ms"), ("decode", "decode ms a token")):
                line[header] = 1e3 * timing[f"{what}_seconds"]
                own = timing[f"{what}_seconds"]  # of decoding: a difference, of noise if very short
                line[f"{what}, dense / this"] = base[f"{what}_seconds"] / own if own > 0 else None
            line["repetitions"] = timing.get("repetitions")
            made.append(line)
    return made
