"""Frames one after the other: which are asked about, dropped and written, and what goes wrong."""

import json
import signal
import threading
from datetime import datetime
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from gap_runtime import Grounder, watch
from gap_runtime.cli.main import main
from gap_runtime.errors import ConfigError, EngineError, InputError
from gap_runtime.grounding.video import source as sources
from gap_runtime.grounding.video import writer as writers
from gap_runtime.grounding.video.change import DEFAULT_CHANGE, LastAsked
from gap_runtime.pictures.boxes import Box

av = pytest.importorskip("av")

SIDE = 64


def draw_square(place):
    """A white square on a grey picture."""
    values = np.full((SIDE, SIDE, 3), 90, np.uint8)
    values[20:36, place : place + 16] = 240
    return Image.fromarray(values)


def encode(path, pictures, *, codec="png", rate=10):
    """A video with these pictures; of the codec png, each frame is a picture of its own."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))
    return path


def decode(path):
    """Moments and pictures of a video."""
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_image()) for frame in container.decode(video=0)]


@pytest.fixture
def bundle(make_bundle, answer_with):
    """A bundle that finds the same box in every picture, and counts by `calls`."""
    backend = answer_with(11)
    folder = make_bundle()
    yield folder
    assert backend.token == 11


@pytest.fixture
def moving(tmp_path):
    """Ten frames, a tenth of a second apart, of a square that moves."""
    return encode(tmp_path / "moving.avi", [draw_square(4 * k) for k in range(10)])


@pytest.fixture
def run(bundle, capsys):
    """A function that runs the command: exit code, stdout, stderr."""

    def run_watch(*arguments):
        code = main(["watch", str(bundle), *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run_watch


def test_every_frame_is_asked_drawn_and_written(bundle, moving, tmp_path):
    out, jsonl = tmp_path / "out.mp4", tmp_path / "boxes.jsonl"
    seen = []
    report = watch(
        bundle,
        moving,
        ["the mug", "the red mug"],
        out=out,
        jsonl=jsonl,
        on_frame=lambda frame, _: seen.append(frame),
    )
    assert (report.frames, report.asked, report.dropped, report.broken) == (10, 10, 0, 0)
    assert (report.is_live, report.is_stopped) == (False, False)
    assert report.duration == pytest.approx(1.0)
    lines = [json.loads(line) for line in jsonl.read_text("utf-8").splitlines()]
    assert [line["frame"] for line in lines] == [k for k in range(10) for _ in range(2)]
    assert [line["seconds"] for line in lines[::2]] == pytest.approx([k / 10 for k in range(10)])
    assert {line["phrase"] for line in lines} == {"the mug", "the red mug"}
    assert all(line["boxes"] == [[16, 16, 48, 32]] for line in lines)
    assert [frame.index for frame in seen] == list(range(10))
    assert seen[0].found[0].boxes == (Box(16, 16, 48, 32),)
    written = decode(out)
    assert [moment for moment, _ in written] == pytest.approx([k / 10 for k in range(10)])
    # The box is drawn in its colour, at the scale of a picture that was enlarged.
    scale = written[0][1].width // SIDE
    red, green, _ = np.asarray(written[0][1])[16 * scale + 1, 32 * scale]
    assert red > 180
    assert green < 120
    assert not list(tmp_path.glob(".*"))


def test_one_of_so_many_frames_and_an_end(bundle, moving):
    seen = []
    watch(
        bundle, moving, "the mug", every=3, seconds=0.7, on_frame=lambda f, _: seen.append(f.index)
    )
    assert seen == [0, 3, 6]


def test_unchanged_frames_are_not_asked_again(bundle, tmp_path):
    rng = np.random.default_rng(0)
    places = [0, 0, 0, 20, 20, 0]
    folder = tmp_path / "frames"
    folder.mkdir()
    for k, place in enumerate(places):
        noise = rng.normal(0, 3, (SIDE, SIDE, 3))
        noisy = np.clip(np.asarray(draw_square(place)) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{k}.png")
    states = []
    report = watch(bundle, folder, "the mug", on_frame=lambda f, _: states.append(f.is_unchanged))
    assert states == [False, True, True, False, True, False]
    assert (report.asked, report.unchanged) == (3, 3)
    assert watch(bundle, folder, "the mug", change=0).asked == 6
    assert watch(bundle, folder, "the mug", change=1).asked == 1


def test_a_small_thing_that_moves_a_little_is_a_change():
    last = LastAsked()
    last.put(draw_square(20))
    assert last.measure(draw_square(20)) == 0
    assert last.measure(draw_square(21)) > DEFAULT_CHANGE
    assert last.measure(draw_square(20).resize((32, 32))) == 1


def test_slow_drift_is_noticed_because_the_last_asked_picture_counts(bundle, tmp_path):
    for k in range(8):
        Image.new("RGB", (SIDE, SIDE), (100 + 5 * k,) * 3).save(tmp_path / f"{k}.png")
    states = []
    watch(bundle, tmp_path, "the mug", on_frame=lambda f, _: states.append(f.is_unchanged))
    # 13 of 255 is over the threshold, which is the third step of five.
    assert states == [False, True, True, False, True, True, False, True]


def break_frame(path, number):
    """Overwrite the values of a picture in a video of pictures, not what says where it ends."""
    data = bytearray(path.read_bytes())
    starts = [k for k in range(len(data) - 4) if data[k : k + 4] == b"IDAT"]
    data[starts[number] + 4 : starts[number] + 24] = b"\xff" * 20
    path.write_bytes(data)


def test_a_broken_frame_is_left_out_and_counted(bundle, moving):
    break_frame(moving, 4)
    seen = []
    report = watch(bundle, moving, "the mug", on_frame=lambda f, _: seen.append(f.index))
    assert (report.frames, report.broken) == (9, 1)
    assert seen == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_broken_picture_of_a_folder_is_left_out(run, tmp_path):
    for k in range(3):
        draw_square(k * 10).save(tmp_path / f"{k}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    code, out, err = run(tmp_path, "--phrase", "the mug")
    assert (code, out) == (
        0,
        "0.000: the mug: 16.0 16.0 48.0 32.0\n2.000: the mug: 16.0 16.0 48.0 32.0\n",
    )
    assert "2 asked, 0 unchanged; 0 dropped, 1 broken" in err


class Camera:
    """A live source by the clock of who looks: `each` frames come while one is looked at."""

    name, is_live, duration = "camera:0", True, None

    def __init__(self, count, each):
        self.count, self.each = count, each
        self.wanted, self.came = threading.Semaphore(0), threading.Semaphore(0)
        self.is_closed, self.error = False, None

    def read(self):
        for index in range(self.count):
            # The first alone, then as many as come while an answer is made.
            if (index - 1) % self.each == 0:
                self.came.release()
                assert self.wanted.acquire(timeout=10)
            yield sources.Frame(
                index=index,
                seconds=index / 10,
                at=datetime.fromisoformat("2026-01-02T03:04:05+00:00"),
                load=lambda k=index: draw_square(k % 40),
            )
        self.came.release(2)
        if self.error is not None:
            raise self.error

    def look(self, picture):
        """Time passes."""
        del picture
        assert self.came.acquire(timeout=10)
        self.wanted.release()
        # The frames of this while have come when the next wait begins.
        assert self.came.acquire(timeout=10)
        self.came.release()

    def close(self):
        self.is_closed = True


@pytest.fixture
def live(monkeypatch):
    """A function that puts a made-up camera in place of what is opened, and makes looks slow."""

    def put(count, each):
        camera = Camera(count, each)
        monkeypatch.setattr("gap_runtime.grounding.video.watch.open_source", lambda _: camera)
        look = Grounder.look

        def look_slowly(self, picture, **options):
            camera.look(picture)
            return look(self, picture, **options)

        monkeypatch.setattr(Grounder, "look", look_slowly)
        return camera

    return put


def test_a_live_source_is_never_waited_for(bundle, live):
    """Five frames come during each look: the newest is taken, four are dropped."""
    camera = live(21, 5)
    seen = []
    report = watch(bundle, "camera:0", "the mug", on_frame=lambda f, _: seen.append(f))
    assert [frame.index for frame in seen] == [0, 5, 10, 15, 20]
    assert (report.frames, report.dropped) == (5, 16)
    assert report.is_live
    assert camera.is_closed
    assert seen[0].dump()[0]["at"] == "2026-01-02T03:04:05.000+00:00"


def test_frames_that_are_not_wanted_count_as_no_dropped_ones(bundle, live):
    live(21, 5)
    report = watch(bundle, "camera:0", "the mug", every=5)
    assert (report.frames, report.dropped) == (5, 0)


def test_a_camera_that_breaks_off_leaves_whole_files(bundle, live, tmp_path):
    camera = live(6, 5)
    camera.error = InputError("camera:0: broke off (Input/output error)")
    jsonl, out = tmp_path / "boxes.jsonl", tmp_path / "out.mp4"
    with pytest.raises(InputError, match="broke off"):
        watch(bundle, "camera:0", "the mug", jsonl=jsonl, out=out)
    assert len(jsonl.read_text("utf-8").splitlines()) == len(decode(out)) == 2


def test_stopping_ends_with_whole_files(bundle, moving, tmp_path):
    stop = threading.Event()
    report = watch(
        bundle,
        moving,
        "the mug",
        out=tmp_path / "out.mkv",
        on_frame=lambda frame, _: stop.set() if frame.index == 3 else None,
        stop=stop,
    )
    assert (report.frames, report.is_stopped) == (4, True)
    assert len(decode(tmp_path / "out.mkv")) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_politely(run, moving, tmp_path, monkeypatch, number):
    look, looked = Grounder.look, []

    def look_and_be_stopped(self, picture, **options):
        looked.append(picture)
        if len(looked) == 3:
            signal.raise_signal(number)
        return look(self, picture, **options)

    monkeypatch.setattr(Grounder, "look", look_and_be_stopped)
    before = signal.getsignal(number)
    jsonl = tmp_path / "boxes.jsonl"
    code, _, err = run(moving, "--phrase", "the mug", "--jsonl", jsonl)
    assert code == 130
    assert "3 frames" in err
    assert "; stopped" in err
    assert len(jsonl.read_text("utf-8").splitlines()) == 3
    assert signal.getsignal(number) is before


def test_a_backend_that_fails_leaves_what_was_found(run, moving, tmp_path, monkeypatch):
    look, looked = Grounder.look, []

    def fail(self, picture, **options):
        looked.append(picture)
        if len(looked) == 3:
            raise EngineError("the device is gone")
        return look(self, picture, **options)

    monkeypatch.setattr(Grounder, "look", fail)
    jsonl = tmp_path / "boxes.jsonl"
    code, _, err = run(moving, "--phrase", "the mug", "--jsonl", jsonl)
    assert (code, err.splitlines()[-1]) == (5, "error: the device is gone")
    assert len(jsonl.read_text("utf-8").splitlines()) == 2


def test_json_lines_as_they_come_and_a_report(run, moving):
    code, out, _ = run(moving, "--phrase", "the mug", "--jsonl", "-", "--every", "5")
    assert code == 0
    assert [json.loads(line)["frame"] for line in out.splitlines()] == [0, 5]
    report = json.loads(run(moving, "--phrase", "the mug", "--json")[1])
    assert (report["frames"], report["is_live"], report["source"]) == (10, False, str(moving))


def test_nothing_is_written_over(run, moving, tmp_path):
    (tmp_path / "there.mp4").write_text("mine", encoding="utf-8")
    for flag in ("--out", "--jsonl"):
        code, _, err = run(moving, "--phrase", "the mug", flag, tmp_path / "there.mp4")
        assert (code, "is there already and not written over" in err) == (2, True)
    assert (tmp_path / "there.mp4").read_text(encoding="utf-8") == "mine"
    code, _, err = run(moving, "--phrase", "the mug", "--out", tmp_path / "no" / "out.mp4")
    assert (code, "no such folder" in err) == (2, True)
    code, _, err = run(moving, "--phrase", "the mug", "--out", tmp_path / "out.gif")
    assert (code, "videos are written as .mp4, .mov, .mkv" in err) == (2, True)


def test_odd_sizes_and_a_picture_of_another_size(bundle, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.new("RGB", (481, 483), (10, 200, 10)).save(folder / "0.png")
    Image.new("RGB", (900, 500), (10, 200, 10)).save(folder / "1.png")
    watch(bundle, folder, "the mug", out=tmp_path / "out.mp4")
    assert [picture.size for _, picture in decode(tmp_path / "out.mp4")] == [(482, 484)] * 2


def make_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))


def test_what_is_no_video_is_told(run, tmp_path, moving):
    (tmp_path / "notes.mp4").write_text("no video", encoding="utf-8")
    make_sound(tmp_path / "sound.wav")
    strange = tmp_path / "strange.avi"
    strange.write_bytes(moving.read_bytes().replace(b"MPNG", b"QZX7"))
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "gone.mp4": "no such file",
        tmp_path / "notes.mp4": "cannot be opened as a video (Invalid data",
        tmp_path / "sound.wav": "no video in it, but audio",
        strange: "in a codec that this PyAV cannot decode",
        tmp_path / "empty": "no picture in this folder",
        "camera:nowhere": "cannot be opened as a video (No such file",
        "rtsp://127.0.0.1:1/x": "cannot be opened as a video (Connection refused)",
    }
    for name, said in cases.items():
        code, out, err = run(name, "--phrase", "the mug", "--jsonl", tmp_path / "boxes.jsonl")
        assert (code, out) == (2, "")
        assert err.count("error: ") == 1
        assert said in err
        assert str(name) in err
    assert not list(tmp_path.glob("*.jsonl")) + list(tmp_path.glob(".*"))


def test_a_source_without_one_good_frame_leaves_no_file(run, moving, tmp_path):
    for number in range(10):
        break_frame(moving, number)
    arguments = ("--phrase", "the mug", "--out", tmp_path / "out.mp4")
    code, _, err = run(moving, *arguments)
    assert (code, "a broken frame" in err) == (2, True)
    assert not list(tmp_path.glob("*.mp4")) + list(tmp_path.glob(".*"))


def test_missing_libraries_and_encoders_are_named(run, moving, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "ENCODERS", (("nonesuch", {}),))
    code, _, err = run(moving, "--phrase", "the mug", "--out", tmp_path / "out.mp4")
    assert (code, "has none of the encoders nonesuch" in err) == (2, True)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    code, _, err = run(moving, "--phrase", "the mug")
    assert (code, "pip install 'gap-runtime[video]'" in err) == (2, True)
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 0}, "every 0"),
        ({"change": 2.0}, "change 2: is outside"),
        ({"seconds": 0.0}, "seconds 0: has to be more"),
        ({"phrases": []}, "no phrase"),
        ({"phrases": [7]}, "a phrase of type int"),
        ({"phrases": "the mug " * 40}, "tokens"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_opened(bundle, moving, settings, said):
    arguments = {"phrases": "the mug", **settings}
    phrases = arguments.pop("phrases")
    with pytest.raises(ConfigError, match=said):
        watch(bundle, moving, phrases, **arguments)


def test_frames_of_phones_are_turned_upright():
    picture = Image.new("RGB", (40, 20))
    picture.putpixel((39, 0), (255, 0, 0))
    # The right upper corner comes to the left upper one when it is turned to the left.
    turned = sources.turn(picture, 90)
    assert (turned.size, turned.getpixel((0, 0))) == ((20, 40), (255, 0, 0))
    assert sources.turn(picture, -90).getpixel((19, 39)) == (255, 0, 0)
    assert sources.turn(picture, 0) is picture


def test_frames_that_are_too_large_are_refused(run, moving, tmp_path, monkeypatch):
    monkeypatch.setattr("gap_runtime.pictures.limits.MAX_PIXELS", SIDE * SIDE - 1)
    code, _, err = run(moving, "--phrase", "the red mug")
    assert code == 2
    assert f"moving.avi: frames of {SIDE}x{SIDE} pixels, at most 4,095 in all" in err
    # Later frames may be of another size than the head of the file says.
    monkeypatch.setattr("gap_runtime.pictures.limits.MAX_PIXELS", 3000)
    path = tmp_path / "grows.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 20, 20, "rgb24"
        for number, side in enumerate((20, SIDE, 20)):
            (packet,) = encode_one(side)
            packet.stream, packet.pts, packet.dts = stream, number, number
            container.mux(packet)
    frames = list(sources.open_source(path).read())
    assert [isinstance(each, InputError) for each in frames] == [False, True, False]


def encode_one(side):
    """A frame as a packet of no file."""
    context = av.CodecContext.create("png", "w")
    context.width = context.height = side
    context.pix_fmt, context.time_base = "rgb24", Fraction(1, 10)
    frame = av.VideoFrame.from_image(Image.new("RGB", (side, side)))
    return [*context.encode(frame), *context.encode(None)]
