"""onnxruntime-genai: the language model from its model builder, run by its generator."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from measure import CAPACITY, find_versions, measure_session, run

NAME: Final = "onnxruntime-genai"
SCOPE: Final = "decoder"
PRECISIONS: Final = ("fp32", "int4")
_LAST_ROW: Final = "prune_lm_head=true"
"""The head would otherwise compute the logits of all rows of a prompt, and nobody reads them."""


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """The builder's graph and its genai_config.json."""
    decoder = options.checkpoint / "decoder"
    extra = [_LAST_ROW]
    if options.precision == "int4":
        extra.append("block_size=128")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(decoder)]
    command += ["--output", str(options.out), "--precision", options.precision]
    with tempfile.TemporaryDirectory() as cache:
        command += ["--execution_provider", "cpu", "--cache_dir", cache]
        subprocess.run([*command, "--extra_options", *extra], check=True)
    if options.precision == "fp32":
        return {"note": "logits of the last row"}
    return {
        "note": "layers and head symmetric int4 in blocks of 128, accuracy level 4 (int8 "
        "activations), embeddings in float32; logits of the last row"
    }


class Generating:
    """A generator of batch 1 whose cache has room for CAPACITY tokens."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Load the model."""
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(folder))
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        # An unused row of the table ends an answer, so that none ends before its last token.
        built = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        model = {"decoder": decoder, "eos_token_id": built["model"]["vocab_size"] - 1}
        config.overlay(json.dumps({"model": model}))
        self._model = onnxruntime_genai.Model(config)
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(max_length=CAPACITY, do_sample=False)
        self._generator = onnxruntime_genai.Generator(self._model, params)

    def prefill(self, token_ids: np.ndarray) -> int:
        """See measure.Session."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(token_ids.astype(np.int32))
        return self._choose()

    def step(self, token: int, position: int) -> int:
        """See measure.Session; reads the token that was chosen last."""
        del token, position
        return self._choose()

    def _choose(self) -> int:
        """Run what was not run yet and take the most likely token."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the generator."""
    import onnxruntime_genai  # noqa: F401 - loading libraries is not loading the model

    return measure_session(
        lambda: Generating(options.out, options.threads),
        options,
        versions=find_versions("onnxruntime-genai", "onnxruntime", "onnx-ir", "transformers"),
        note="onnxruntime-genai's generator; one float32 cache of 1024 slots, written in place",
    )


if __name__ == "__main__":
    run(prepare, measure)
