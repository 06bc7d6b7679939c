"""A picture and a phrase in, boxes out: the runtime's one job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, overload

import numpy as np
from PIL import Image

from gap_runtime.backends import (
    DEFAULT_BACKEND,
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
from gap_runtime.errors import BundleError, ConfigError, EngineError, InputError
from gap_runtime.grounding.confidence import score_answer
from gap_runtime.grounding.decode import Decoded, decode_greedily, splice_prompt
from gap_runtime.grounding.fastest import choose_backend
from gap_runtime.grounding.prompt import (
    PhraseEncoder,
    PromptEncoder,
    collapse,
    load_tokenizer,
    require_text,
)
from gap_runtime.grounding.prompt_cache import PromptCache
from gap_runtime.grounding.view import (
    DEFAULT_KEPT_MIB,
    Grounding,
    KeptViews,
    View,
    VisionOutput,
)
from gap_runtime.pictures.boxes import parse_boxes
from gap_runtime.pictures.load import (
    ChannelOrder,
    ImageInput,
    find_bucket,
    frame_picture,
    make_pixels,
    open_picture,
)
from gap_runtime.pictures.preprocess import Bucket

if TYPE_CHECKING:
    from typing_extensions import Self


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


class Grounder:
    """A bundle loaded for use. Graphs are loaded at first need and kept until `close`.

    It is a context manager too. Threads that share one take turns: an answer at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str | Runner = DEFAULT_BACKEND,
        *,
        ratio: float | None = None,
        keep: int | None = None,
        draft: bool = True,
        follow: bool = False,
        keep_pictures: int = DEFAULT_KEPT_MIB,
    ) -> None:
        """Load the tokenizer and map the embeddings.

        Args:
            bundle: An opened bundle.
            backend: A name as `onnxruntime`, `onnxruntime:cuda` or `openvino`; `auto` for the one
                that was the fastest when `bench --all` measured it. Or a backend itself.
            ratio: One of the bundle's ratios; the first one it was exported with by default.
            keep: Or a count of visual tokens that stay.
            draft: Send what the form of an answer forces, and what boxes before make likely,
                along with each token. It changes the time that an answer takes; the answer only
                where two tokens tie. With False it depends on no answer before.
            follow: Send the last answer to the same phrase too. It pays where pictures are frames.
            keep_pictures: MiB for what was computed of the last pictures, which are known again
                by their content; 0 keeps none. A View is kept by whoever has it.

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
        if not isinstance(keep_pictures, int) or keep_pictures < 0:
            raise ConfigError(f"keep_pictures {keep_pictures!r:.60}: expected MiB, 0 or more")
        self._backend: Runner
        if isinstance(backend, str):
            self._backend, self._device = open_backend(choose_backend(bundle, backend))
        elif hasattr(backend, "open_stage"):
            self._backend, self._device = backend, ""
        else:
            raise ConfigError(f"a backend of type {type(backend).__name__}; expected a name")
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
        self._is_closed = False
        self._turn = RLock()
        form = bundle.manifest.box.form if draft else None
        self._drafter = self.encoder.make_drafter(form, follow=follow)
        self._stages: dict[str, StageSession] = {}
        self._cache: PromptCache | None = None
        self._kept_bytes = keep_pictures * 2**20
        self._views = KeptViews(self._kept_bytes)
        self._phrases: PhraseEncoder | None = None
        spec = bundle.manifest.phrase
        if spec is not None and spec.tokenizer is not None:
            self._phrases = PhraseEncoder(load_tokenizer(bundle.folder / spec.tokenizer), spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        """The bundle and its backend, on one line."""
        state = ", closed" if self._is_closed else ""
        return f"Grounder({self.bundle!r}, ratio {self.default_ratio.ratio:g}{state})"

    def close(self) -> None:
        """Give up graphs, cache and pictures; after that it cannot be used. Twice is no error."""
        with self._turn:
            self._is_closed = True
            self._stages = {}
            self._cache = None
            self._views = KeptViews(0)
            self._table = np.empty((0, 0), np.float32)

    @overload
    def ground(
        self,
        image: ImageInput,
        phrase: str,
        *,
        ratio: float | None = None,
        keep: int | None = None,
        order: ChannelOrder = "RGB",
    ) -> Grounding: ...

    @overload
    def ground(
        self,
        image: ImageInput,
        phrase: list[str] | tuple[str, ...],
        *,
        ratio: float | None = None,
        keep: int | None = None,
        order: ChannelOrder = "RGB",
    ) -> tuple[Grounding, ...]: ...

    def ground(
        self,
        image: ImageInput,
        phrase: str | list[str] | tuple[str, ...],
        *,
        ratio: float | None = None,
        keep: int | None = None,
        order: ChannelOrder = "RGB",
    ) -> Grounding | tuple[Grounding, ...]:
        """Ask where a phrase is, or each of several.

        Args:
            image: A file, its bytes, a Pillow picture of any mode, or a frame: an array of uint8
                [height, width, 3].
            phrase: What to ground, for example `the red mug`; a list or tuple of phrases gives a
                tuple of groundings.
            ratio: Another of the bundle's ratios than the one this was made with.
            keep: Or a count of visual tokens that stay.
            order: Of a frame's channels: `RGB`, or `BGR` as OpenCV has it.

        Raises:
            InputError: The picture or a phrase cannot be used.
            EngineError: The backend failed.
        """
        if isinstance(phrase, str):
            return self.look(image, order=order).ground(phrase, ratio=ratio, keep=keep)
        if not isinstance(phrase, (list, tuple)):
            raise InputError(
                f"a phrase of type {type(phrase).__name__}; expected a str, or a list of them"
            )
        for each in phrase:
            require_text(each)
        view = self.look(image, order=order)
        return tuple(view.ground(each, ratio=ratio, keep=keep) for each in phrase)

    def look(self, image: ImageInput, *, order: ChannelOrder = "RGB") -> View:
        """Look at a picture that several phrases will be asked about: `view.ground(phrase)`.

        Nothing runs yet. What all phrases share is computed for the first one.

        Args:
            image: As for `ground`.
            order: As for `ground`.

        Raises:
            InputError: The picture cannot be used.
        """
        self._require_open()
        if order == "RGB" and isinstance(image, bytes):
            return self.look_at_file(image, open_picture)
        return self._look(open_picture(image, order=order))

    def look_at_file(self, data: bytes, read: Callable[[bytes], Image.Image]) -> View:
        """Look at the bytes of a picture file, which are not read where that picture is kept.

        Args:
            data: The file.
            read: Makes RGB of it.

        Raises:
            InputError: The picture cannot be used.
        """
        self._require_open()
        with self._turn:
            found = self._views.find_file(data)
        return found or self._look(read(data), data)

    def _look(self, picture: Image.Image, data: bytes | None = None) -> View:
        manifest = self.bundle.manifest
        bucket = find_bucket(picture.size, manifest.preprocess, manifest.buckets)
        with self._turn:
            return self._views.find(self._make_view(picture, bucket), data)

    def _make_view(self, picture: Image.Image, bucket: Bucket) -> View:
        frame = frame_picture(picture.size, self.bundle.manifest.preprocess, bucket)
        return View(picture=picture, bucket=bucket.name, frame=frame, ask=self._ask)

    def _ask(self, view: View, phrase: str, *, ratio: float | None, keep: int | None) -> Grounding:
        """See View.ground."""
        require_text(phrase)
        if ratio is None and keep is None:
            keep = self._keep
            ratio = self.default_ratio.ratio if keep is None else None
        entry = self.bundle.choose_ratio(ratio, view.bucket, keep=keep)
        is_held = False
        # Graphs write where the cache and their outputs lie: one answer at a time.
        with self._turn:
            try:
                values = self.run_stages(view, phrase, entry)
                is_held = True
                if self._drafter:
                    self._drafter.keep(values.decoded.token_ids)
            finally:
                self._views.note(view, is_held=is_held)
        answer = self.encoder.decode(values.decoded.token_ids)
        parsed = parse_boxes(answer, self.bundle.manifest.box, view.frame)
        return Grounding(
            phrase=phrase,
            answer=answer,
            boxes=parsed.boxes,
            score=(
                self.score(values.decoded.token_ids, values.decoded.probabilities)
                if parsed.boxes
                else 0.0
            ),
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

    def score(self, token_ids: Sequence[int], probabilities: Sequence[float]) -> float:
        """How sure the model was of the boxes in an answer, in [0, 1].

        Args:
            token_ids: Of the answer.
            probabilities: Of these tokens.
        """
        return score_answer(
            token_ids, probabilities, self.encoder.decode, self.bundle.manifest.box
        )

    def count_kept(self) -> tuple[int, int]:
        """How many pictures are kept because they may come again, and their bytes."""
        return len(self._views), self._views.count_bytes()

    def run_stages(
        self,
        view: View | Image.Image,
        phrase: str,
        entry: RatioEntry,
        *,
        most: int | None = None,
        draft: bool = True,
    ) -> StageValues:
        """Run every stage and keep what each gave; of a view only what is not known of it yet.

        Args:
            view: A picture that was looked at, or RGB.
            phrase: What to ground.
            entry: Of the picture's bucket.
            most: Tokens to decode, whether or not the answer ends before.
            draft: False decodes token by token, however this was made.
        """
        self._require_open()
        manifest = self.bundle.manifest
        if not isinstance(view, View):
            view = self._make_view(view, manifest.bucket(entry.bucket))
        # Before anything runs, so that a phrase of no use leaves nothing behind.
        prompt = self.encoder.encode_within(phrase, manifest.layout)
        vision = view.outputs.get(entry)
        is_new = vision is None
        if vision is None:
            vision = self.run_vision(view.picture, phrase, entry, pixels=view.pixels)
            view.pixels = vision.pixels
            if not self.reads_phrase(entry):
                view.put(entry, vision)
        drafter = self._drafter.about(collapse(phrase)) if self._drafter and draft else None
        cache = self._open_cache()
        looked = time.perf_counter()
        with cache.begin(prompt.prefix, vision, prompt.suffix) as held:
            rows = splice_prompt(self._table, prompt.prefix, vision.visual_tokens, prompt.suffix)
            decoded = decode_greedily(
                cache.session,
                self._table,
                rows[:, held:],
                vision.position_ids,
                held=held,
                most=manifest.layout.answer if most is None else most,
                capacity=manifest.layout.capacity,
                stop_ids=manifest.prompt.stop_ids if most is None else (),
                drafter=drafter,
            )
        answered_ms = (time.perf_counter() - looked) * 1e3
        preprocess_ms = vision.preprocess_ms if is_new else 0.0
        vision_ms = vision.vision_ms if is_new else 0.0
        return StageValues(
            prompt_ids=prompt.prefix + prompt.suffix,
            pixels=vision.pixels,
            visual_tokens=vision.visual_tokens,
            kept_index=vision.kept_index,
            position_ids=vision.position_ids,
            decoded=decoded,
            milliseconds={
                "preprocess": preprocess_ms,
                "vision": vision_ms,
                "prefill": decoded.prefill_ms,
                "decode": decoded.decode_ms,
                "total": preprocess_ms + vision_ms + answered_ms,
            },
        )

    def run_vision(
        self,
        picture: Image.Image,
        phrase: str,
        entry: RatioEntry,
        *,
        pixels: np.ndarray | None = None,
    ) -> VisionOutput:
        """Run the stages before the decoder on an RGB picture.

        Args:
            picture: RGB.
            phrase: For a pruner that reads it, see `reads_phrase`.
            entry: Of the picture's bucket.
            pixels: Of the same picture, made before.
        """
        manifest = self.bundle.manifest
        stage = manifest.stage(VISION, entry)
        session = self._open(stage)
        reads_phrase = self.reads_phrase(entry)
        text = self._open(manifest.stage(TEXT)) if reads_phrase and self._phrases else None
        began = time.perf_counter()
        if pixels is None:
            pixels = make_pixels(picture, manifest.preprocess, manifest.bucket(entry.bucket))
        prepared = time.perf_counter()
        inputs = {"pixels": pixels}
        if reads_phrase:
            inputs[TEXT_FEATURES] = self._read_phrase(phrase, text)
        given = session.run(inputs)
        layout = manifest.layout.at(entry)
        end = layout.positions - layout.answer
        # onnxruntime 1.24 would read memory behind the decoder's rotary tables.
        _require_below(given["position_ids"], end, "position IDs", stage.file)
        _require_below(given["kept_index"], entry.patches, "kept patches", stage.file)
        looked = time.perf_counter()
        # Copies of what a session may write over at its next run.
        return VisionOutput(
            pixels=pixels,
            visual_tokens=given["visual_tokens"].copy(),
            kept_index=given["kept_index"].copy(),
            position_ids=given["position_ids"].copy(),
            preprocess_ms=(prepared - began) * 1e3,
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

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this grounder was closed; make another Grounder(bundle)")

    def _open(self, stage: Stage) -> StageSession:
        """A graph's session; where there is no room for it, the other graphs give way."""
        if stage.name not in self._stages:
            try:
                opened = self._backend.open_stage(self.bundle, stage, self._device)
            except EngineError:
                # Other ratios and canvases have towers of their own, as large as this one.
                if not self._stages:
                    raise
                self._stages.clear()
                opened = self._backend.open_stage(self.bundle, stage, self._device)
            self._stages[stage.name] = opened
        return self._stages[stage.name]

    def _open_cache(self) -> PromptCache:
        if self._cache is None:
            manifest = self.bundle.manifest
            session = self._backend.open_decoder(
                self.bundle, manifest.stage(DECODER), self._device
            )
            self._cache = PromptCache(
                session,
                manifest.cache,
                capacity=manifest.layout.capacity,
                limit=self._kept_bytes,
            )
        return self._cache


def _require_below(indices: np.ndarray, end: int, what: str, file: str) -> None:
    """Refuse indices of a vision graph that lie outside what they count."""
    least, most = int(indices.min()), int(indices.max())
    if least < 0 or most >= end:
        raise EngineError(
            f"{file} gave {what} from {least} to {most}, expected 0 to {end - 1} at most; "
            "export the bundle again"
        )
