"""A hub that does not answer costs a moment, and caches still serve."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from snnllm import hub
from snnllm.hub import hub_answers, offline_unless_it_answers


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    hub._asked.cache_clear()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that answers every request with an error."""

    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        yield


@pytest.mark.usefixtures("endpoint")
def test_any_answer_is_one() -> None:
    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    assert hub_answers()
    with offline_unless_it_answers(config):
        assert not constants.HF_HUB_OFFLINE
        assert not config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("silence")
def test_silence_means_offline_for_the_block_only() -> None:
    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    start = time.perf_counter()
    with offline_unless_it_answers(config):
        assert time.perf_counter() - start < 4.0
        assert constants.HF_HUB_OFFLINE
        assert config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert not config.HF_HUB_OFFLINE


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    assert not hub_answers()


def test_nobody_is_asked_who_wants_to_be_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snnllm.hub.hub_answers", lambda: pytest.fail("asked the hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    with offline_unless_it_answers(config):
        assert config.HF_HUB_OFFLINE
    assert not config.HF_HUB_OFFLINE


def test_a_hub_that_comes_back_is_seen(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    now = 1000.0
    monkeypatch.setattr(hub, "monotonic", lambda: now)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    assert not hub_answers()
    request.getfixturevalue("endpoint")
    assert not hub_answers()  # asked a moment ago
    now += 60.0
    assert hub_answers()


def test_threads_take_turns_and_leave_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    inside, leave, done = (threading.Event() for _ in range(3))

    def first() -> None:
        with offline_unless_it_answers(), offline_unless_it_answers():
            inside.set()
            leave.wait(5)

    def second() -> None:
        with offline_unless_it_answers():
            done.wait(5)  # leaves last

    threads = [threading.Thread(target=target) for target in (first, second)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    time.sleep(0.1)  # until the second one waits, or without a lock runs
    leave.set()
    threads[0].join()
    done.set()
    threads[1].join()
    assert not constants.HF_HUB_OFFLINE
