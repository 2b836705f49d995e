"""The tables of the paper: which rows they have, how a row is measured, and how they are written.

`snnllm.paper.tables` is the model zoo, one `Row` per line; a new table is a function there, and its
name in `snnllm.paper.settings`. `snnllm.paper.runner` converts and measures, `snnllm.paper.report` writes.
"""
