r"""Record the membrane potentials of a few neurons while a prompt runs, and draw them.

Example::

    python -m sims.membrane smollm2 --layers model.layers.3.mlp.down_proj --channels auto:6 \
        --prompt "The capital of France is" --output membranes

writes membrane.npz (all recorded arrays), membrane.csv (one row per layer, token, channel, step)
and one membrane_LAYER.png per layer. Membranes are in firing thresholds: v_after_reset is the
membrane after fire and reset, v_before_fire the charged one before. Every token starts at z + 1/2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sims.common import (
    Subject,
    add_conversion_arguments,
    add_model_argument,
    add_recording_arguments,
    check_folder,
    load_subject,
    make_folder,
    read_conversion,
    record_prompt,
    run_script,
    save_recording,
)
from sims.plots import membrane_figure, save_figure


def simulate(
    subject: Subject,
    prompt: str,
    layers: Sequence[str],
    tokens: str,
    channels: str,
    memory_limit: int,
    output: Path,
    csv_rows: int = 1_000_000,
    max_panels: int = 12,
) -> list[Path]:
    """Record and draw membranes of a loaded model; other arguments as in ``--help``.

    Returns:
        The files that were written.

    Raises:
        ValueError: A layer, token, channel or prompt that does not exist or fit.
        OSError: The output cannot be written.
    """
    recording = record_prompt(subject, prompt, layers, tokens, channels, memory_limit)
    folder = make_folder(output)
    files = save_recording(recording, folder, "membrane", csv_rows)
    for name, trace in tqdm(recording.layers.items(), desc="drawing", unit="layer"):
        if len(trace.channels) > max_panels:
            print(
                f"{name}: the figure shows the first {max_panels} of {len(trace.channels)} channels"
            )
        figure = membrane_figure(trace, recording.labels, max_panels)
        files.append(save_figure(figure, folder / f"membrane_{name}.png"))
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        Exit code: 0, or 2 for input that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sims.membrane",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser)
    add_recording_arguments(parser, "model.layers.0.self_attn.q_proj", "auto:6")
    add_conversion_arguments(parser)
    options = parser.parse_args(argv)

    def run() -> int:
        check_folder(options.output)  # before the model is loaded, which takes longer
        files = simulate(
            load_subject(options.model, read_conversion(options)),
            options.prompt,
            options.layers,
            options.tokens,
            options.channels,
            int(options.memory_limit * 2**20),
            options.output,
            options.csv_rows,
        )
        print("\n".join(f"wrote {path}" for path in files))
        return 0

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
