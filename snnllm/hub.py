"""Whether the Hugging Face hub can be reached, asked briefly and at most once a minute."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from time import monotonic
from typing import Any

__all__ = ["hub_answers", "offline_unless_it_answers"]

_log = logging.getLogger(__name__)
_SECONDS, _REMEMBERED = 5.0, 60.0
_offline = threading.RLock()


def hub_answers() -> bool:
    """Whether the hub answers at all, whatever it says; remembered until the minute is over.

    The clients of the hub retry for half a minute before they give up; this asks once, and waits for
    `HF_HUB_ETAG_TIMEOUT` seconds (5 without it) in all, name look-up included.
    """
    return _asked(int(monotonic() / _REMEMBERED))


@lru_cache(maxsize=1)
def _asked(minute: int) -> bool:
    from huggingface_hub import constants, get_session

    answers = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))
        except Exception as error:  # each release of the client has types of its own
            _log.info("%s does not answer: %s", constants.ENDPOINT, error)

    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _SECONDS)
    # A thread, because the timeout of a request is one of each address and not of the look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


@contextmanager
def offline_unless_it_answers(*configs: Any) -> Iterator[None]:
    """Run a block in the hub client's offline mode, where caches still serve, if the hub is silent.

    The mode belongs to the process: threads take turns, and a block inside of another one changes nothing
    that outlasts it.

    Args:
        configs: Modules that hold a `HF_HUB_OFFLINE` of their own, as `datasets.config` does.
    """
    from huggingface_hub import constants

    modules = (constants, *configs)
    with _offline:
        before = [module.HF_HUB_OFFLINE for module in modules]
        offline = any(before) or not hub_answers()
        try:
            for module in modules:
                module.HF_HUB_OFFLINE = offline
            yield
        finally:
            for module, value in zip(modules, before, strict=True):
                module.HF_HUB_OFFLINE = value
