"""optimum-intel's export and OpenVINO's runtime, which OpenVINO GenAI runs on.

The graphs of the export are run without OpenVINO GenAI's pipeline, whose prompts have lengths of
their own: this way the number of rows is exact and nothing but the graphs is timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from measure import find_versions, make_pixels, measure_session, run

NAME: Final = "OpenVINO GenAI"
SCOPE: Final = "whole"
PRECISIONS: Final = ("fp32", "int4")
_INT4: Final = ("--sym", "--group-size", "128", "--ratio", "1.0")


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Vision, embeddings, language model and tokenizer as OpenVINO IR."""
    # optimum-intel asks for torchvision, whose build for another torch breaks when it is imported.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from optimum.commands.optimum_cli import main

    sys.argv = ["optimum-cli", "export", "openvino", "--model", str(options.checkpoint)]
    sys.argv += ["--task", "image-text-to-text", "--weight-format", options.precision]
    sys.argv += [*(_INT4 if options.precision == "int4" else ()), str(options.out)]
    main()
    if options.precision == "fp32":
        return {"note": ""}
    return {"note": "layers symmetric int4 in groups of 128; embeddings, head and vision in int8"}


def keep_last_row(model: Any) -> None:
    """Let a language model compute the logits of the last row only, as the pipeline does.

    Args:
        model: Is changed; its logits come from a matrix product of the rows [1, S, D].
    """
    from openvino import opset13

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = opset13.slice(node.input_value(0), [-1], [-2], [-1], [1])
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class Compiled:
    """The graphs of one folder, compiled for the CPU, batch 1."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        """Load the language model and the embeddings."""
        import openvino

        self._folder = folder
        self._precision = precision
        self._core = openvino.Core()
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": True,
        }
        if precision == "fp32":
            self._settings["INFERENCE_PRECISION_HINT"] = "f32"
        self._embeddings = self._open("text_embeddings")
        self._language = self._open("language")
        self._vision: Any = None
        self._pixels = make_pixels()

    def _open(self, part: str) -> Any:
        """A graph of the export, ready to run."""
        model = self._core.read_model(self._folder / f"openvino_{part}_model.xml")
        if part == "language":
            keep_last_row(model)
        return self._core.compile_model(model, "CPU", self._settings).create_infer_request()

    def open_vision(self) -> None:
        """Load the vision graph."""
        self._vision = self._open("vision_embeddings")

    def prefill(self, token_ids: np.ndarray) -> int:
        """See measure.Session."""
        self._language.reset_state()
        return self._run(token_ids[None], 0)

    def step(self, token: int, position: int) -> int:
        """See measure.Session."""
        return self._run(np.array([[token]]), position)

    def see(self) -> Any:
        """The visual tokens of a picture."""
        return self._vision.infer({"pixel_values": self._pixels}, share_inputs=True)

    def _run(self, token_ids: np.ndarray, start: int) -> int:
        end = start + token_ids.shape[1]
        rows = self._embeddings.infer([token_ids], share_inputs=True, share_outputs=True)
        given = self._language.infer(
            {
                "inputs_embeds": rows[0],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(start, end)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_inputs=True,
            share_outputs=True,
        )
        return int(given["logits"][0, -1].argmax())

    def describe(self) -> str:
        """Precisions that the language model was compiled with."""
        model = self._language.get_compiled_model()
        kind, cache, group = (
            model.get_property(name)
            for name in (
                "INFERENCE_PRECISION_HINT",
                "KV_CACHE_PRECISION",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE",
            )
        )
        text = f"computes in {kind.to_string()}, cache {cache.to_string()}"
        if group and self._precision != "fp32":
            text += f", activations of int4 layers in int8 by groups of {group}"
        return text


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the graphs."""
    import openvino  # noqa: F401 - loading libraries is not loading the model

    opened: list[Compiled] = []

    def open_session() -> Compiled:
        opened.append(Compiled(options.out, options.precision, options.threads))
        return opened[0]

    answer = measure_session(
        open_session,
        options,
        open_vision=Compiled.open_vision,
        see=Compiled.see,
        versions=find_versions("openvino", "optimum-intel", "nncf", "transformers"),
    )
    note = f"graphs of the export on OpenVINO's runtime, not its pipeline; {opened[0].describe()}"
    return answer | {"note": note}


if __name__ == "__main__":
    run(prepare, measure)
