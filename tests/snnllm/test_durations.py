"""Times as people read them."""

from __future__ import annotations

import pytest

from snnllm.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0041, "0.0041 s"),
        (0.312, "0.31 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (12.3, "12 s"),
        (204, "3.4 min"),
        (20160, "5.6 h"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
