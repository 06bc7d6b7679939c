"""transformers' own ONNX exporter with its fusions for the CPU, on onnxruntime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from measure import (
    OnnxDecoder,
    find_versions,
    make_pixels,
    make_tokens,
    measure_session,
    open_onnx,
    run,
)

NAME: Final = "transformers.exporters"
SCOPE: Final = "whole"
PRECISIONS: Final = ("fp32", "int4", "fp16")
_BLOCK: Final = 32


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """A decoder that reads any number of tokens behind any cache, and a vision graph.

    `export_for_generation` of this version leaves the vision tower out (generate runs it before
    the forward that is recorded) and computes the logits of all rows. So its parts are exported
    one by one, through the same exporter and with logits of the last row alone.
    """
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    class Vision(torch.nn.Module):
        """Tower and projector."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            """Visual tokens [1, N, D]."""
            features = self.model.get_image_features(pixel_values, return_dict=True)
            return torch.cat(tuple(features.pooler_output), 0)

    torch.set_grad_enabled(False)
    model = LlavaForConditionalGeneration.from_pretrained(
        options.checkpoint,
        dtype=torch.float16 if options.precision == "fp16" else torch.float32,
        local_files_only=True,
    ).eval()
    fusions = None if options.precision == "fp16" else "cpu"
    exporter = OnnxExporter()
    token_ids = torch.from_numpy(make_tokens(48))[None]
    sample = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    parts = decompose_for_generation(model, sample, multi_token_decode=True)
    decoder, inputs = parts["decode"]
    config = OnnxConfig(dynamic=True, ort_fusions=fusions)
    exported = exporter.export(decoder, {**inputs, "logits_to_keep": 1}, config)
    exported.save_pretrained(options.out / "decoder")
    del exported, parts, decoder, inputs
    config = OnnxConfig(ort_fusions=fusions)
    pixels = {"pixel_values": torch.from_numpy(make_pixels()).to(model.dtype)}
    exporter.export(Vision(model), pixels, config).save_pretrained(options.out / "vision")
    if options.precision != "int4":
        return {"note": "GroupQueryAttention with a growing cache"}
    quantize(options.out / "decoder" / "model.onnx")
    return {"note": f"decoder in int4 by onnxruntime, blocks of {_BLOCK}; vision in float32"}


def quantize(path: Path) -> None:
    """Replace a graph by one whose MatMuls have int4 weights, with int8 activations inside."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(path), bits=4, block_size=_BLOCK, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    for old in (path, path.with_name(f"{path.name}.data")):
        old.unlink()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


class Exported:
    """The two graphs."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Load both."""
        self._decoder = OnnxDecoder(
            folder / "decoder" / "model.onnx", threads, past="input.", present="output."
        )
        self._vision = open_onnx(folder / "vision" / "model.onnx", threads)
        self._pixels = make_pixels()

    def prefill(self, token_ids: np.ndarray) -> int:
        """See measure.Session."""
        return self._decoder.prefill(token_ids)

    def step(self, token: int, position: int) -> int:
        """See measure.Session."""
        return self._decoder.step(token, position)

    def see(self) -> Any:
        """The visual tokens of a picture."""
        name = self._vision.get_inputs()[0].name
        return self._vision.run(None, {name: self._pixels})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the graphs."""
    import onnxruntime  # noqa: F401 - loading libraries is not loading the model

    return measure_session(
        lambda: Exported(options.out, options.threads),
        options,
        see=Exported.see,
        versions=find_versions("torch", "transformers", "onnxruntime"),
    )


if __name__ == "__main__":
    run(prepare, measure)
