"""Phrases in pictures that follow each other: grounded, drawn and written as they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypedDict

from PIL import Image

from gap_runtime.backends import DEFAULT_BACKEND
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import ConfigError, GapError, InputError
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.grounding.video.change import DEFAULT_CHANGE, LastAsked
from gap_runtime.grounding.video.latest import LatestFrames
from gap_runtime.grounding.video.source import Frame, Source, open_source
from gap_runtime.grounding.video.writer import open_lines, open_video, require_format, require_new
from gap_runtime.grounding.view import AnswerFacts, Grounding
from gap_runtime.pictures.drawing import draw_groundings

_HOPELESS: Final = 100
"""Broken frames at the beginning of a source after which no good one is waited for."""


class LiveFacts(TypedDict, total=False):
    """When a frame of a live source came, in ISO 8601."""

    at: str


class FrameFacts(AnswerFacts, LiveFacts):
    """A phrase in a frame: which frame, how many seconds behind the first one, and what was found.

    `unchanged`: it looked as the frame before, whose boxes these are. `at`: of live sources.
    All else is as `gap-runtime ground --json` has it.
    """

    frame: int
    seconds: float
    unchanged: bool


class WatchSummary(TypedDict):
    """What was watched: as WatchReport has it, and the `rate` in frames a second.

    Of the source's frames `frames` were taken: `asked` of them, and `unchanged` which looked as
    the one before. `dropped` ones came while an earlier one was looked at, `broken` ones could
    not be used. `seconds` is how far the source is, of `duration` where that is known; `elapsed`
    is how long it took. `is_stopped`: it was ended before its source did.
    """

    source: str
    is_live: bool
    duration: float | None
    frames: int
    asked: int
    unchanged: int
    dropped: int
    broken: int
    seconds: float
    elapsed: float
    is_stopped: bool
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class WatchedFrame:
    """A frame and what was found in it, a grounding for each phrase.

    `index` counts all frames of the source from 0, `seconds` is since its first one, `at` is when
    it came, of live sources alone. Where `is_unchanged`, the groundings are those of an earlier
    frame that looked the same.
    """

    index: int
    seconds: float
    at: datetime | None
    picture: Image.Image
    found: tuple[Grounding, ...]
    is_unchanged: bool

    def __repr__(self) -> str:
        """When it is and how much was found, on one line."""
        boxes = sum(len(each.boxes) for each in self.found)
        return f"WatchedFrame({self.index} at {self.seconds:.3f} s: {boxes} boxes)"

    def dump(self) -> list[dict[str, Any]]:
        """Plain data for JSON, a line for each phrase."""
        head: dict[str, Any] = {
            "frame": self.index,
            "seconds": round(self.seconds, 6),
            "unchanged": self.is_unchanged,
        }
        if self.at is not None:
            head["at"] = self.at.isoformat(timespec="milliseconds")
        return [{**head, **_shorten(each.dump())} for each in self.found]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchReport:
    """What was watched, so far or in all.

    Of the source's frames `frames` were taken: `asked` of them, and `unchanged` which looked as
    the one before. `dropped` ones came while an earlier one was looked at, `broken` ones could
    not be used. `seconds` is how far the source is, of `duration` where that is known; `elapsed`
    is how long it took, without the time to load the models. `is_stopped` says that it was ended
    before its source did.
    """

    source: str
    is_live: bool
    duration: float | None
    frames: int = 0
    asked: int = 0
    unchanged: int = 0
    dropped: int = 0
    broken: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    is_stopped: bool = False

    @property
    def rate(self) -> float:
        """Frames a second, 0 where it is too early to say."""
        return (self.frames - 1) / self.elapsed if self.elapsed else 0.0


OnFrame = Callable[[WatchedFrame, WatchReport], None]


def watch(
    bundle: Bundle | str | Path,
    source: str | Path,
    phrases: str | Sequence[str],
    backend: str = DEFAULT_BACKEND,
    *,
    ratio: float | None = None,
    keep: int | None = None,
    draft: bool = True,
    every: int = 1,
    change: float = DEFAULT_CHANGE,
    least_score: float = 0.0,
    seconds: float | None = None,
    out: str | Path | None = None,
    jsonl: str | Path | None = None,
    on_frame: OnFrame | None = None,
    stop: threading.Event | None = None,
) -> WatchReport:
    """Ground phrases in frame after frame, as the command `gap-runtime watch` does.

    Args:
        bundle: Opened, or its folder.
        source: A video, a folder of pictures, `camera:0` or an address; as
            `gap_runtime.grounding.video.source.open_source` has it.
        phrases: What to look for; one or several.
        backend: As in Grounder.
        ratio: One of the bundle's ratios; the first by default.
        keep: Or a count of visual tokens that stay.
        draft: As in Grounder; what a phrase was answered last is drafted too.
        every: Take one of so many frames.
        change: A frame is asked about where a cell of 32 x 32 differs by more than this share of
            the brightest value from the frame that was asked about last; 0 asks about all.
        least_score: Leave out boxes that the model is less sure of.
        seconds: End when the source is so far.
        out: A video (.mp4, .mov, .mkv) with the frames that were taken, drawn.
        jsonl: A file with a JSON line for each frame and phrase.
        on_frame: Called with every frame and the report so far.
        stop: Set it to end early; the files are whole then. An exception from `on_frame` leaves
            no file.

    Raises:
        InputError: The source cannot be opened, or broke off; files hold what was found until
            then.
        ConfigError: A setting, or a file that cannot be written.
        EngineError: The backend failed; files hold what was found until then.
    """
    names = (phrases,) if isinstance(phrases, str) else tuple(phrases)
    _require_settings(names, every, change, seconds)
    video = None if out is None else Path(out)
    lines = None if jsonl is None else Path(jsonl)
    _require_outputs(video, lines)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    with ExitStack() as stack:
        # Frames do not come again, so that none is kept.
        grounder = stack.enter_context(
            Grounder(
                opened,
                backend,
                ratio=ratio,
                keep=keep,
                draft=draft,
                follow=True,
                keep_pictures=0,
            )
        )
        for phrase in names:
            grounder.encoder.encode_within(phrase, opened.manifest.layout)
        frames = stack.enter_context(closing(open_source(source)))
        watcher = Watcher(
            grounder,
            frames,
            names,
            every=every,
            change=change,
            least_score=least_score,
            seconds=seconds,
            stop=stop,
        )
        write = None if lines is None else stack.enter_context(open_lines(lines))
        painter = None if video is None else stack.enter_context(open_video(video))
        for frame in watcher.run():
            if write is not None:
                for line in frame.dump():
                    write(line)
            if painter is not None:
                painter.add(draw_frame(opened, frame), frame.seconds)
            if on_frame is not None:
                on_frame(frame, watcher.report)
    # Out here, where all files are whole.
    if watcher.error is not None:
        raise watcher.error
    return watcher.report


def _require_settings(
    phrases: Sequence[object], every: int, change: float, seconds: float | None
) -> None:
    if not phrases:
        raise ConfigError("no phrase; say what to look for")
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise InputError(f"a phrase of type {type(phrase).__name__}; expected a str")
    if every < 1:
        raise ConfigError(f"every {every}: one of so many frames is taken, at least 1")
    if not 0 <= change <= 1:
        raise ConfigError(f"change {change:g}: is outside [0, 1]")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds {seconds:g}: has to be more than 0")


def _require_outputs(video: Path | None, lines: Path | None) -> None:
    if video is not None:
        require_format(video)
    for path in (video, lines):
        if path is not None:
            require_new(path)


def draw_frame(bundle: Bundle, frame: WatchedFrame) -> Image.Image:
    """A frame with its boxes, and with removed patches shaded where they are the same for all."""
    kept = {each.kept_index for each in frame.found}
    patches = max(each.patches for each in frame.found)
    return draw_groundings(
        frame.picture,
        bundle.manifest.preprocess,
        bundle.manifest.buckets,
        [(each.phrase, each.boxes) for each in frame.found],
        kept_index=kept.pop() if len(kept) == 1 else tuple(range(patches)),
    )


class Watcher:
    """Frames of a source, grounded one after the other.

    `report` is so far; `error` is what ended it behind the first frame, if anything did.
    """

    def __init__(
        self,
        grounder: Grounder,
        source: Source,
        phrases: tuple[str, ...],
        *,
        every: int,
        change: float,
        least_score: float,
        seconds: float | None,
        stop: threading.Event | None,
    ) -> None:
        """Nothing is read yet. Arguments as for `watch`."""
        self.report = WatchReport(
            source=source.name, is_live=source.is_live, duration=source.duration
        )
        self.error: GapError | None = None
        self._grounder, self._source, self._phrases = grounder, source, phrases
        self._every, self._change, self._seconds = every, change, seconds
        self._least_score = least_score
        self._stop = threading.Event() if stop is None else stop
        self._last = LastAsked()
        self._found: tuple[Grounding, ...] = ()
        self._began: float | None = None

    def run(self) -> Iterator[WatchedFrame]:
        """Every frame that is taken.

        Raises:
            GapError: Not one frame could be used.
        """
        problem: GapError | None = None
        try:
            with closing(self._read()) as frames:
                for frame in frames:
                    if self._stop.is_set() or self._is_behind(frame):
                        break
                    try:
                        if isinstance(frame, InputError):
                            raise frame
                        watched = self._look(frame)
                    except InputError as error:
                        problem = error
                        self._count(broken=1)
                        if not self.report.frames and self.report.broken >= _HOPELESS:
                            break
                        continue
                    yield watched
        except GapError as error:
            if not self.report.frames:
                raise
            self.error = error
        is_stopped = self._stop.is_set()
        self.report = replace(self.report, is_stopped=is_stopped)
        if not self.report.frames:
            why = "stopped before its first" if is_stopped else "could not be used: it has no"
            said = f"{self._source.name}: {why} frame"
            raise InputError(said if problem is None else str(problem)) from problem

    def _read(self) -> Generator[Frame | InputError, None, None]:
        """Frames that are wanted."""
        if not self._source.is_live:
            for frame in self._source.read():
                if isinstance(frame, InputError) or frame.index % self._every == 0:
                    yield frame
            return
        with closing(LatestFrames(self._source, every=self._every)) as latest:
            for frame in latest.read(self._stop.is_set):
                self.report = replace(self.report, dropped=latest.dropped)
                yield frame
            self.report = replace(self.report, dropped=latest.dropped)

    def _is_behind(self, frame: Frame | InputError) -> bool:
        """Whether it lies behind the end that is wanted; the first frame never does."""
        if self._seconds is None or isinstance(frame, InputError):
            return False
        return frame.seconds >= self._seconds

    def _look(self, frame: Frame) -> WatchedFrame:
        picture = frame.load()
        is_unchanged = bool(self._found) and self._last.measure(picture) <= self._change > 0
        if not is_unchanged:
            view = self._grounder.look(picture)
            found = tuple(
                view.ground(phrase).reject_below(self._least_score) for phrase in self._phrases
            )
            self._last.put(picture)
            self._found = found
        self._count(frames=1, asked=not is_unchanged, unchanged=is_unchanged)
        # From the end of the first frame on, which loads the models.
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        self.report = replace(self.report, seconds=frame.seconds, elapsed=now - self._began)
        return WatchedFrame(
            index=frame.index,
            seconds=frame.seconds,
            at=frame.at,
            picture=picture,
            found=self._found,
            is_unchanged=is_unchanged,
        )

    def _count(
        self, *, frames: int = 0, asked: int = 0, unchanged: int = 0, broken: int = 0
    ) -> None:
        before = self.report
        self.report = replace(
            before,
            frames=before.frames + frames,
            asked=before.asked + asked,
            unchanged=before.unchanged + unchanged,
            broken=before.broken + broken,
        )


def _shorten(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without the kept patches, which would be most of a file."""
    return {key: value for key, value in data.items() if key != "kept_index"}
