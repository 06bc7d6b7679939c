"""onnxruntime runs the graphs, on the CPU or through one of its providers."""

from gap_runtime.backends.onnxruntime.session import open_decoder, open_stage

__all__ = ["open_decoder", "open_stage"]
