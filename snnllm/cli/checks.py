"""What several commands refuse before they begin; nothing here loads torch unless a GPU is asked for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from snnllm.locate import check_model
from snnllm.texts import check_text

if TYPE_CHECKING:
    import torch


def check_calibration(args: argparse.Namespace) -> None:
    """Refuse calibration options that no model could make good.

    Raises:
        ValueError: A number out of range, or an unknown text.
        FileNotFoundError: There is no such text file.
    """
    check_at_least_one(args, "nsamples", "seqlen")
    check_text(args.calibration)


def check_usable(args: argparse.Namespace, model: str, spiking: bool = False) -> None:
    """Refuse a device or a model that is not there, before anything is loaded or downloaded for nothing.

    Args:
        args: With the `device`; None for one that is chosen later.
        model: What `open_source` takes.
        spiking: Whether a spiking checkpoint will do as well.

    Raises:
        ValueError: Says which, and the remedy.
    """
    if args.device not in (None, "cpu"):  # a CPU is always there, and to ask loads torch
        checked_device(args.device)
    check_model(model, spiking)


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1; options that were not given pass.

    Raises:
        ValueError: Names the option.
    """
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least 1, got {value}.")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt without text.

    Raises:
        ValueError: It is blank.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty; give some text to continue.")


def check_folder_of(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written at the end.

    Raises:
        ValueError: Its folder does not exist.
    """
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}; make it first.")


def checked_device(name: str) -> torch.device:
    """A device that exists.

    Raises:
        ValueError: Unknown device, or CUDA without a GPU.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}; use cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA GPU (or a CPU build of torch).")
    return device
