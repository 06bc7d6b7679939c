"""A picture and a phrase in, boxes out: the runtime's one job."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from gap_runtime.boxes import Box, parse_boxes
from gap_runtime.bundle import Bundle
from gap_runtime.decode import Decoded, decode_greedily, splice_prompt
from gap_runtime.errors import BundleError
from gap_runtime.image import load_picture, make_pixels, to_rgb
from gap_runtime.manifest import DECODER, VISION, RatioEntry
from gap_runtime.prompt import PromptEncoder
from gap_runtime.registry import load_plugin
from gap_runtime.session import Backend, DecoderSession, VisionSession

DEFAULT_BACKEND: Final = "onnxruntime"
_BACKENDS: Final = "gap_runtime.backends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grounding:
    """Where a phrase is in a picture.

    `problems` says what in the answer was no usable box. `kept_index` are the patches that
    stayed, by slot. `milliseconds` is by stage: preprocess, vision, prefill, decode, total.
    """

    phrase: str
    answer: str
    boxes: tuple[Box, ...]
    problems: tuple[str, ...]
    ratio: float
    kept: int
    patches: int
    kept_index: tuple[int, ...]
    token_ids: tuple[int, ...]
    milliseconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageValues:
    """What the stages gave on the way to an answer, for comparison with the reference."""

    prompt_ids: list[int]
    pixels: np.ndarray
    visual_tokens: np.ndarray
    kept_index: np.ndarray
    position_ids: np.ndarray
    decoded: Decoded
    milliseconds: dict[str, float]


def open_backend(name: str) -> tuple[Backend, str]:
    """A backend module by name, and the device after a colon in the name (or nothing).

    Raises:
        UnknownNameError: There is no such backend.
    """
    module, _, device = name.partition(":")
    backend: Backend = load_plugin(_BACKENDS, module, "backend")
    return backend, device


class Grounder:
    """A bundle loaded for use. Graphs are loaded at first need and kept."""

    def __init__(
        self, bundle: Bundle, backend: str = DEFAULT_BACKEND, *, ratio: float | None = None
    ) -> None:
        """Load the tokenizer and map the embeddings.

        Args:
            bundle: An opened bundle.
            backend: `onnxruntime`, `onnxruntime:cpu` or `onnxruntime:cuda`.
            ratio: One of the bundle's ratios; the first one it was exported with by default.

        Raises:
            ConfigError: Unknown backend or ratio.
            BundleError: The bundle holds graphs alone and no tokenizer.
        """
        self.bundle = bundle
        self.default_ratio = bundle.choose_ratio(ratio)
        self._backend, self._device = open_backend(backend)
        prompt = bundle.manifest.prompt
        if prompt.tokenizer is None:
            raise BundleError(
                f"{bundle.folder}: no tokenizer in it (the checkpoint had none), so it takes no "
                "phrase; add tokenizer.json to the checkpoint and export again"
            )
        self.encoder = PromptEncoder(bundle.folder / prompt.tokenizer, prompt)
        self._table = bundle.map_embedding()
        self._visions: dict[int, VisionSession] = {}
        self._decoder: DecoderSession | None = None

    def ground(
        self, image: str | Path | Image.Image, phrase: str, *, ratio: float | None = None
    ) -> Grounding:
        """Ask where a phrase is.

        Args:
            image: A file or a Pillow picture of any mode.
            phrase: What to ground, for example `the red mug`.
            ratio: Another of the bundle's ratios than the one this was made with.

        Raises:
            InputError: The picture or the phrase cannot be used.
            EngineError: The backend failed.
        """
        entry = self.default_ratio if ratio is None else self.bundle.choose_ratio(ratio)
        picture = load_picture(image) if isinstance(image, (str, Path)) else to_rgb(image)
        values = self.run_stages(picture, phrase, entry)
        answer = self.encoder.decode(values.decoded.token_ids)
        parsed = parse_boxes(answer, self.bundle.manifest.box, *picture.size)
        return Grounding(
            phrase=phrase,
            answer=answer,
            boxes=parsed.boxes,
            problems=parsed.problems,
            ratio=entry.ratio,
            kept=entry.kept,
            patches=entry.patches,
            kept_index=tuple(values.kept_index[0].tolist()),
            token_ids=tuple(values.decoded.token_ids),
            milliseconds=values.milliseconds,
        )

    def run_stages(
        self, picture: Image.Image, phrase: str, entry: RatioEntry, *, most: int | None = None
    ) -> StageValues:
        """Run every stage on an RGB picture and keep what each gave.

        `most` tokens are decoded where it is given, whether or not the answer ends before.
        """
        manifest = self.bundle.manifest
        prompt = self.encoder.encode_within(phrase, manifest.layout)
        vision, decoder = self._open_vision(entry.kept), self._open_decoder()
        began = time.perf_counter()
        pixels = make_pixels(picture, manifest.preprocess)
        prepared = time.perf_counter()
        seen = vision.run(pixels)
        visual, position_ids = seen["visual_tokens"], seen["position_ids"]
        looked = time.perf_counter()
        layout = manifest.layout.at(entry.kept)
        embeddings = splice_prompt(
            self._table, prompt.prefix, visual, prompt.suffix, layout.prompt
        )
        decoded = decode_greedily(
            decoder,
            self._table,
            embeddings,
            position_ids,
            length=layout.prefix + layout.visual + len(prompt.suffix),
            most=layout.answer if most is None else most,
            stop_ids=manifest.prompt.stop_ids if most is None else (),
        )
        return StageValues(
            prompt_ids=prompt.prefix + prompt.suffix,
            pixels=pixels,
            visual_tokens=visual,
            kept_index=seen["kept_index"],
            position_ids=position_ids,
            decoded=decoded,
            milliseconds={
                "preprocess": (prepared - began) * 1e3,
                "vision": (looked - prepared) * 1e3,
                "prefill": decoded.prefill_ms,
                "decode": decoded.decode_ms,
                "total": (time.perf_counter() - began) * 1e3,
            },
        )

    def _open_vision(self, kept: int) -> VisionSession:
        if kept not in self._visions:
            stage = self.bundle.manifest.stage(VISION, kept)
            self._visions[kept] = self._backend.open_vision(self.bundle, stage, self._device)
        return self._visions[kept]

    def _open_decoder(self) -> DecoderSession:
        if self._decoder is None:
            stage = self.bundle.manifest.stage(DECODER)
            self._decoder = self._backend.open_decoder(self.bundle, stage, self._device)
        return self._decoder
