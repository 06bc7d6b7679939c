"""OpenVINO on the CPU; :gpu, :npu: on Intel's GPU or NPU, as OpenVINO names them.

The graphs of portable bundles run as they are, as do vision and text graphs of opset 24.
"""

from typing import Final

from gap_runtime.backends.openvino.missing import find_missing
from gap_runtime.backends.openvino.session import open_decoder, open_stage

SHORT_NAMES: Final = {"ov": "openvino"}
"""Other names that `--backend` takes for it."""

__all__ = ["find_missing", "open_decoder", "open_stage"]
