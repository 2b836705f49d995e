"""Triton kernels compile for a GPU where there is none: the interpreter takes more than the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (pip install triton)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile them on this GPU")
def test_kernels_compile_for_hopper():
    script = Path(__file__).with_name("compile_for_hopper.py")
    root = script.parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    assert names.count("_rotary_tables") == 3
    assert {"_append_greedy", "_store", "decode", "prefill", "dot_product"} <= set(names)
    assert {"_encode_rows", "_encode_rows_in_tiles", "rotate_and_encode_kernel"} <= set(names)
    # Tables of 8 bits: two dtypes, three widths; few to many rows.
    assert (names.count("_embed"), names.count("_head")) == (6, 18)
    # 2, 4 and 8 bits, merged with 4 and 8 bits, 16 and 300 rows; accumulators.
    assert names.count("matmul") == 11
