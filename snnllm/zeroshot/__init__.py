"""Definitions of the six zero-shot tasks of the paper for lm-evaluation-harness, read from local rows.

Prompts, answers and metrics are those of the harness; only the rows come from JSONL files, so that no
network is needed. `snnllm eval --tasks ... --task-data FOLDER` uses them, and so does the harness:

    lm_eval --include_path FOLDER_OF_THIS_PACKAGE --tasks piqa_local --metadata '{"folder": ...}' ...
"""

from pathlib import Path

__all__ = ["DEFINITIONS", "ZERO_SHOT_TASKS"]

DEFINITIONS = Path(__file__).parent
"""Folder of the YAML files."""

ZERO_SHOT_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
"""The tasks that have local definitions, by the harness's own names; the order of the paper."""
