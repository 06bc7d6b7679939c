"""A picture and a phrase in, boxes out: the runtime's one job."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gap_runtime.backends import (
    DEFAULT_BACKEND,
    DecoderSession,
    Runner,
    StageSession,
    open_backend,
)
from gap_runtime.bundle.bundle import Bundle, embedding_rows
from gap_runtime.bundle.manifest import (
    DECODER,
    TEXT,
    TEXT_FEATURES,
    TEXT_IDS,
    VISION,
    RatioEntry,
    Stage,
)
from gap_runtime.errors import BundleError, ConfigError, InputError
from gap_runtime.grounding.decode import Decoded, decode_greedily, splice_prompt
from gap_runtime.grounding.prompt import PhraseEncoder, PromptEncoder, load_tokenizer
from gap_runtime.pictures.boxes import Box, parse_boxes
from gap_runtime.pictures.load import find_bucket, frame_picture, make_pixels, open_picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Grounding:
    """Where a phrase is in a picture.

    `problems` says what in the answer was no usable box. `kept_index` are the patches that
    stayed, by slot. `milliseconds` is by stage: preprocess, vision, prefill, decode, total.
    `calls` of the decoder, the prefill among them, held `drafted` tokens of which `accepted`
    turned out right.
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
    calls: int
    drafted: int
    accepted: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionOutput:
    """What the vision stages gave of a picture at one ratio, and the pixels that they took."""

    pixels: np.ndarray
    visual_tokens: np.ndarray
    kept_index: np.ndarray
    position_ids: np.ndarray
    preprocess_ms: float
    vision_ms: float


class Grounder:
    """A bundle loaded for use. Graphs are loaded at first need and kept."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str | Runner = DEFAULT_BACKEND,
        *,
        ratio: float | None = None,
        keep: int | None = None,
        draft: bool = True,
    ) -> None:
        """Load the tokenizer and map the embeddings.

        Args:
            bundle: An opened bundle.
            backend: `onnxruntime`, `onnxruntime:cpu` or `onnxruntime:cuda`.
                Or a backend itself.
            ratio: One of the bundle's ratios; the first one it was exported with by default.
            keep: Or a count of visual tokens that stay.
            draft: Send what the form of an answer forces along with each token. It changes the
                time that an answer takes; the answer only where two tokens tie.

        Raises:
            ConfigError: Unknown backend or ratio.
            BundleError: The bundle holds graphs alone and no tokenizer.
        """
        if not isinstance(bundle, Bundle):
            raise ConfigError(
                f"a bundle of type {type(bundle).__name__}; open it first: "
                "Grounder(Bundle.open(folder))"
            )
        self.bundle = bundle
        self.default_ratio = bundle.choose_ratio(ratio, keep=keep)
        self._keep = keep
        self._backend, self._device = (
            open_backend(backend) if isinstance(backend, str) else (backend, "")
        )
        prompt = bundle.manifest.prompt
        if prompt.tokenizer is None:
            raise BundleError(
                f"{bundle.folder}: no tokenizer in it (the checkpoint had none), so it takes no "
                "phrase; add tokenizer.json to the checkpoint and export again"
            )
        self.encoder = PromptEncoder(
            load_tokenizer(bundle.folder / prompt.tokenizer),
            prompt,
            rows=bundle.manifest.embedding.shape[0],
        )
        self._table = bundle.map_embedding()
        self._drafter = self.encoder.make_drafter(bundle.manifest.box.form) if draft else None
        self._stages: dict[str, StageSession] = {}
        self._decoder: DecoderSession | None = None
        self._phrases: PhraseEncoder | None = None
        spec = bundle.manifest.phrase
        if spec is not None and spec.tokenizer is not None:
            self._phrases = PhraseEncoder(load_tokenizer(bundle.folder / spec.tokenizer), spec)

    def ground(
        self,
        image: str | Path | bytes | Image.Image | np.ndarray,
        phrase: str,
        *,
        ratio: float | None = None,
        keep: int | None = None,
    ) -> Grounding:
        """Ask where a phrase is.

        Args:
            image: A file, its bytes, a Pillow picture of any mode, or an array of uint8 in RGB
                order [height, width, 3].
            phrase: What to ground, for example `the red mug`.
            ratio: Another of the bundle's ratios than the one this was made with.
            keep: Or a count of visual tokens that stay.

        Raises:
            InputError: The picture or the phrase cannot be used.
            EngineError: The backend failed.
        """
        if not isinstance(phrase, str):
            raise InputError(f"a phrase of type {type(phrase).__name__}; expected a str")
        picture = open_picture(image)
        manifest = self.bundle.manifest
        bucket = find_bucket(picture.size, manifest.preprocess, manifest.buckets)
        if ratio is None and keep is None:
            keep = self._keep
            ratio = self.default_ratio.ratio if keep is None else None
        entry = self.bundle.choose_ratio(ratio, bucket.name, keep=keep)
        values = self.run_stages(picture, phrase, entry)
        answer = self.encoder.decode(values.decoded.token_ids)
        frame = frame_picture(picture.size, manifest.preprocess, bucket)
        parsed = parse_boxes(answer, manifest.box, frame)
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
            calls=values.decoded.calls,
            drafted=values.decoded.drafted,
            accepted=values.decoded.accepted,
        )

    def run_stages(
        self,
        picture: Image.Image,
        phrase: str,
        entry: RatioEntry,
        *,
        most: int | None = None,
        vision: VisionOutput | None = None,
        draft: bool = True,
    ) -> StageValues:
        """Run every stage on an RGB picture and keep what each gave.

        Args:
            picture: RGB.
            phrase: What to ground.
            entry: Of the picture's bucket.
            most: Tokens to decode, whether or not the answer ends before.
            vision: What `run_vision` gave of this picture at this ratio, to be used instead.
            draft: False decodes token by token, however this was made.
        """
        manifest = self.bundle.manifest
        prompt = self.encoder.encode_within(phrase, manifest.layout)
        if vision is None:
            vision = self.run_vision(picture, phrase, entry)
        decoder = self._open_decoder()
        looked = time.perf_counter()
        layout = manifest.layout.at(entry)
        decoded = decode_greedily(
            decoder,
            self._table,
            splice_prompt(self._table, prompt.prefix, vision.visual_tokens, prompt.suffix),
            vision.position_ids,
            most=layout.answer if most is None else most,
            capacity=manifest.layout.capacity,
            stop_ids=manifest.prompt.stop_ids if most is None else (),
            drafter=self._drafter if draft else None,
        )
        answered_ms = (time.perf_counter() - looked) * 1e3
        return StageValues(
            prompt_ids=prompt.prefix + prompt.suffix,
            pixels=vision.pixels,
            visual_tokens=vision.visual_tokens,
            kept_index=vision.kept_index,
            position_ids=vision.position_ids,
            decoded=decoded,
            milliseconds={
                "preprocess": vision.preprocess_ms,
                "vision": vision.vision_ms,
                "prefill": decoded.prefill_ms,
                "decode": decoded.decode_ms,
                "total": vision.preprocess_ms + vision.vision_ms + answered_ms,
            },
        )

    def run_vision(
        self,
        picture: Image.Image,
        phrase: str,
        entry: RatioEntry,
        *,
        before: VisionOutput | None = None,
    ) -> VisionOutput:
        """Run the stages before the decoder on an RGB picture.

        Args:
            picture: RGB.
            phrase: For a pruner that reads it, see `reads_phrase`.
            entry: Of the picture's bucket.
            before: Of the same picture, whose pixels are used again.
        """
        manifest = self.bundle.manifest
        stage = manifest.stage(VISION, entry)
        session = self._open(stage)
        reads_phrase = self.reads_phrase(entry)
        text = self._open(manifest.stage(TEXT)) if reads_phrase and self._phrases else None
        began = time.perf_counter()
        if before is None:
            pixels = make_pixels(picture, manifest.preprocess, manifest.bucket(entry.bucket))
        else:
            pixels = before.pixels
        prepared = time.perf_counter()
        inputs = {"pixels": pixels}
        if reads_phrase:
            inputs[TEXT_FEATURES] = self._read_phrase(phrase, text)
        given = session.run(inputs)
        looked = time.perf_counter()
        preprocess_ms = (prepared - began) * 1e3
        return VisionOutput(
            pixels=pixels,
            visual_tokens=given["visual_tokens"],
            kept_index=given["kept_index"],
            position_ids=given["position_ids"],
            preprocess_ms=preprocess_ms if before is None else before.preprocess_ms,
            vision_ms=(looked - prepared) * 1e3,
        )

    def reads_phrase(self, entry: RatioEntry) -> bool:
        """Whether what the vision graph of a ratio gives depends on the phrase."""
        inputs = self.bundle.manifest.stage(VISION, entry).inputs
        return any(spec.name == TEXT_FEATURES for spec in inputs)

    def _read_phrase(self, phrase: str, text: StageSession | None) -> np.ndarray:
        """What the vision graph is told of the phrase, float32 [1, W]."""
        if text is not None and self._phrases is not None:
            return text.run({TEXT_IDS: self._phrases.encode(phrase)})[TEXT_FEATURES]
        rows = embedding_rows(self._table, self.encoder.encode_phrase(phrase))
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        mean: np.ndarray = (rows / np.maximum(lengths, 1e-12)).mean(axis=0, keepdims=True)
        return mean

    def _open(self, stage: Stage) -> StageSession:
        if stage.name not in self._stages:
            self._stages[stage.name] = self._backend.open_stage(self.bundle, stage, self._device)
        return self._stages[stage.name]

    def _open_decoder(self) -> DecoderSession:
        if self._decoder is None:
            stage = self.bundle.manifest.stage(DECODER)
            self._decoder = self._backend.open_decoder(self.bundle, stage, self._device)
        return self._decoder
