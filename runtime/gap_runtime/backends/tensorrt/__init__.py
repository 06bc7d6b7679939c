"""TensorRT compiles the graphs to engines and runs them."""

from gap_runtime.backends.tensorrt.session import build, open_decoder, open_stage

__all__ = ["build", "open_decoder", "open_stage"]
