"""Sources of `watch`: videos damaged in their bytes, and what is no video at all."""

import io
import os
from fractions import Fraction

import numpy as np

from fuzz import mutations
from fuzz.bundles import PHRASE, forbidden, remove
from fuzz.inputs import check_picture
from fuzz.outcome import WrongResultError, run_line
from gap_runtime.cli.main import main
from gap_runtime.errors import InputError
from gap_runtime.grounding.video.source import open_source

KINDS = (
    *(("mp4", "mpeg4", "yuv420p"), ("mov", "mpeg4", "yuv420p"), ("matroska", "mpeg4", "yuv420p")),
    *(("mpegts", "mpeg2video", "yuv420p"), ("avi", "mjpeg", "yuvj420p"), ("gif", "gif", "rgb8")),
    *(("nut", "ffv1", "yuv444p"), ("apng", "apng", "rgb24"), ("y4m", "wrapped_avframe", "gray")),
)
PLAYLISTS = (
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile {}\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
)
ELSEWHERE = (
    "/etc/passwd",
    "http://127.0.0.1:9/x.ts",
    "/dev/zero",
    "../x.mp4",
    "tcp://127.0.0.1:9",
)
FRAMES = 8


def encode(kind, codec, pixels):
    """A video of a few small frames; None where this PyAV does not write such."""
    import av

    file = io.BytesIO()
    values = np.random.default_rng(3).integers(0, 255, (FRAMES, 32, 48, 3), np.uint8)
    try:
        with av.open(file, "w", format={"y4m": "yuv4mpegpipe"}.get(kind, kind)) as out:
            stream = out.add_stream(codec, rate=Fraction(10))
            stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
            for each in values:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
            out.mux(stream.encode())
    except (av.FFmpegError, ValueError, OSError):
        return None
    return file.getvalue()


def videos(case):
    """Files in place of a video."""
    import av

    av.logging.set_level(None)
    encoded = {kind[0]: data for kind in KINDS if (data := encode(*kind))}
    folder = case.folder.parent / "videos"
    folder.mkdir(exist_ok=True)

    def make(rng):
        kind = rng.choice(sorted(encoded))
        way = rng.choice(("bytes",) * 30 + ("whole", "pipe", "unreadable", "playlist", "playlist"))
        data = encoded[kind]
        if way == "playlist":
            data = rng.choice(PLAYLISTS).format(rng.choice(ELSEWHERE)).encode()
            data = mutations.change_bytes(data, rng) if rng.random() < 0.5 else data
        elif way != "whole":
            data = mutations.change_bytes(data, rng)
        path = folder / f"video.{rng.choice((kind, 'mp4', 'm3u8', 'sdp', 'txt'))}"

        def run():
            remove(path)
            if way == "pipe":
                os.mkfifo(path)
            else:
                path.write_bytes(data)
                path.chmod(0 if way == "unreadable" else 0o600)
            if rng.random() < 0.05:
                return run_line(
                    main, ("watch", case.source, path, "--phrase", PHRASE, "--json", "--every", 4)
                )
            with forbidden(on=way == "unreadable"):
                return read(path)

        return f"{kind} {way} {path.suffix}", run

    return make


def read(path):
    """Every frame of a source; broken ones are told and passed."""
    source, before = open_source(path), -1
    try:
        for number, frame in enumerate(source.read()):
            if isinstance(frame, InputError):
                continue
            if not before < frame.index or not abs(frame.seconds) < 1e18:
                raise WrongResultError(f"frame {frame.index} at {frame.seconds} behind {before}")
            before = frame.index
            try:
                check_picture(frame.load())
            except InputError:
                continue
            if number > 20 * FRAMES:
                return
    finally:
        source.close()
