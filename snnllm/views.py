"""Names of the three equal views; importing them loads no torch."""

from __future__ import annotations

from enum import StrEnum


class View(StrEnum):
    """The views of method.md section 3.

    Attributes:
        BINARY: Every multi-level spike is spread into binary events; additions only.
        UNROLLED: Neurons run over T steps, one integer matmul a step; membranes can be recorded.
        COLLAPSED: One integer matmul over the spike counts; what fast inference runs.
    """

    BINARY = "binary"
    UNROLLED = "unrolled"
    COLLAPSED = "collapsed"
