"""GPUs that the installed onnxruntime has no kernels for are told before a session opens."""

import pytest

from gap_runtime.backends.onnxruntime import loading
from gap_runtime.backends.onnxruntime import session as backend
from gap_runtime.bundle.manifest import VISION
from gap_runtime.errors import EngineError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_vision(bundle, device):
    return backend.open_stage(bundle, bundle.manifest.stage(VISION), device)


@pytest.fixture
def put_kernels(ort, fakes, monkeypatch):
    """A function that gives the installed onnxruntime kernels for some GPUs, and a GPU of 8.7."""

    def put(*kernels, **changes):
        ort.__file__ = "/site/onnxruntime/__init__.py"
        ort.available = [CUDA, CPU]
        gpu = fakes.FakeCuda(capability=(8, 7), **changes)
        monkeypatch.setattr(loading, "list_kernels", lambda _path: kernels)
        monkeypatch.setattr(loading, "find_cudart", lambda _ort: gpu)

    return put


def test_a_gpu_that_onnxruntime_has_no_kernels_for(ort, decoder_bundle, put_kernels, caplog):
    """The session would start, and fail at the first kernel."""
    put_kernels("8.9", "9.0a")
    with pytest.raises(EngineError) as caught:
        open_vision(decoder_bundle, "cuda")
    message = str(caught.value)
    assert (
        "has kernels for compute capability 8.9 and 9.0 alone, the GPU here is of 8.7" in message
    )
    assert "--target jetson-orin-jp6 or jetson-orin-jp7, whose engines run on it" in message
    assert message.endswith("without :cuda it runs on the CPU")
    assert not ort.sessions
    open_vision(decoder_bundle, "")
    assert ort.sessions[0].providers == [(CPU, {})]
    assert "alone, the GPU here is of 8.7" in caplog.text
    assert caplog.text.rstrip().endswith("it runs on the CPU")


@pytest.mark.parametrize(
    ("kernels", "changes"), [(("8.0",), {}), ((), {}), (("8.9",), {"devices": 0})]
)
def test_kernels_that_serve_or_are_not_known(ort, decoder_bundle, put_kernels, kernels, changes):
    put_kernels(*kernels, **changes)
    open_vision(decoder_bundle, "cuda")
    assert ort.sessions[0].providers == [(CUDA, {"use_tf32": "0"})]
