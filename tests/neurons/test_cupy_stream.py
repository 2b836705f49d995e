"""CuPy runs on the stream of torch, before and after its version 14."""

import pytest

from neurons.backends import cupy_gif


@pytest.mark.parametrize("version", [13, 14])
def test_cupy_runs_on_the_stream_of_torch(version):
    class Stream:
        pass

    class Stream14:
        @staticmethod
        def from_external(stream):
            return "14", *stream.__cuda_stream__()

    cuda = type("Cuda", (), {"ExternalStream": staticmethod(lambda pointer: ("13", 0, pointer))})
    cuda.Stream = Stream14 if version == 14 else Stream
    assert cupy_gif._stream(cuda, 42) == (str(version), 0, 42)
