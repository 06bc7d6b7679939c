"""What is computed once for phrases and pictures, on a backend that writes down all it does."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli.main import main
from gap_runtime.errors import EngineError, InputError
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.grounding.prompt_cache import PromptCache
from gap_runtime.grounding.view import View, VisionOutput
from gap_runtime.pictures.load import open_picture

BOX_TOKEN = 11
MUG, RED = "the mug", "the red mug"
"""Six and seven tokens behind the picture, of which the first three are the same."""


def make_picture(shade):
    return Image.new("RGB", (40, 40), (shade, 100, 50))


@dataclasses.dataclass
class Copied:
    count: int
    size: int


@pytest.fixture
def backend(answer_with, monkeypatch):
    """The fake backend, whose decoder saves slots: `saved` and `put` are counts, in order."""
    found = answer_with(BOX_TOKEN)
    found.saved, found.put = [], []
    open_decoder = found.open_decoder

    def open_saver(*arguments):
        decoder = open_decoder(*arguments)

        def copy_slots(count):
            found.saved.append(count)
            # Two tensors of one head, two wide, in float32.
            return Copied(count, 16 * count)

        decoder.copy_slots = copy_slots
        decoder.put_slots = lambda copied: found.put.append(copied.count)
        return decoder

    monkeypatch.setattr(found, "open_decoder", open_saver)
    return found


@pytest.fixture
def make_grounder(make_bundle, backend):
    """A function that opens a bundle on it."""
    assert backend.opened == []
    return lambda keep=256, **changes: Grounder(
        Bundle.open(make_bundle(**changes)), keep_pictures=keep
    )


def prompts(backend):
    """(first slot, rows) of every prefill: calls of several rows."""
    calls = [(slot, rows.shape[1]) for rows, _, slot, _ in backend.decoded]
    return [(slot, rows) for slot, rows in calls if rows > 1]


def looks(backend):
    return [name for name, _ in backend.calls]


def test_a_further_phrase_computes_only_what_differs(make_grounder, backend):
    grounder = make_grounder()
    view = grounder.look(make_picture(1))
    assert backend.opened == []
    first, second = view.ground(MUG), view.ground(RED)
    assert looks(backend) == ["vision-8"]
    # One token before the picture, eight of it, and "Where is the".
    assert prompts(backend) == [(0, 15), (12, 4)]
    embeddings, positions, _, wanted = backend.decoded[2]
    # Table row k is (2k, 2k + 1): "red mug ? ASSISTANT:".
    assert embeddings.tolist() == [[[2 * k, 2 * k + 1] for k in (7, 8, 9, 3)]]
    assert positions.tolist() == [list(range(12, 16))]
    assert wanted == [3]
    # The answer goes on behind it.
    assert backend.decoded[3][2] == 16
    assert first.kept_index == second.kept_index
    assert first.milliseconds["vision"] > 0
    assert second.milliseconds["vision"] == second.milliseconds["preprocess"] == 0
    parts = sum(ms for stage, ms in second.milliseconds.items() if stage != "total")
    assert second.milliseconds["total"] >= parts


def test_another_picture_or_ratio_finds_the_text_before_it(make_grounder, backend, two_before):
    grounder = make_grounder(keep=0, **two_before)
    view = grounder.look(make_picture(1))
    view.ground(MUG)
    grounder.look(make_picture(2)).ground(MUG)
    view.ground(MUG, ratio=0.75)
    assert prompts(backend) == [(0, 16), (2, 14), (2, 10)]
    assert looks(backend) == ["vision-8", "vision-8", "vision-4"]
    # The pixels are those of the first look.
    assert backend.calls[0][1]["pixels"] is backend.calls[2][1]["pixels"]


def test_pictures_are_within_their_memory_before_any_phrase(make_grounder):
    grounder = make_grounder(keep=1)
    for number in range(4):
        values = np.full((600, 600, 3), number, np.uint8)
        with pytest.raises(InputError):
            grounder.look(Image.fromarray(values)).ground("a </s> b")
    count, size = grounder.count_kept()
    assert (count, size <= 2**20) == (0, True)


def test_a_picture_that_comes_again_is_known_by_its_content(make_grounder, backend):
    grounder = make_grounder()
    values = np.asarray(make_picture(1))
    for image in (make_picture(1), values, values.copy()):
        grounder.ground(image, MUG)
    assert looks(backend) == ["vision-8"]
    grounder.ground(np.ascontiguousarray(values[:20]), MUG)
    assert looks(backend) == ["vision-8", "vision-8"]


def save(picture, kind):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_a_file_that_comes_again_is_not_read_again(make_grounder, backend):
    grounder, read = make_grounder(), []

    def look(data):
        read.append(data)
        return open_picture(data)

    png, tiff = save(make_picture(1), "png"), save(make_picture(1), "tiff")
    other = save(make_picture(2), "png")
    views = [grounder.look_at_file(data, look) for data in (png, png, other, tiff, tiff, png)]
    # The two files are of one picture, which is known by the one that came last.
    assert read == [png, other, tiff, png]
    assert [view is views[0] for view in views] == [True, True, False, True, True, True]
    for data in (png, bytearray(tiff), png):
        grounder.ground(data, MUG)
    assert looks(backend) == ["vision-8"]
    assert read == [png, other, tiff, png]


def test_a_file_whose_picture_gave_way_is_read_again(make_grounder):
    grounder = make_grounder(keep=1)
    values = [np.full((500, 500, 3), number, np.uint8) for number in range(2)]
    files = [save(Image.fromarray(each), "png") for each in values]
    first = grounder.look(files[0])
    assert grounder.look(files[0]) is first
    grounder.look(files[1])
    assert grounder.look(files[0]) is not first
    assert np.array_equal(np.asarray(grounder.look(files[0]).picture), values[0])


def test_no_file_is_known_where_no_picture_is_kept(make_grounder):
    grounder, file = make_grounder(keep=0), save(make_picture(1), "png")
    assert grounder.look(file) is not grounder.look(file)


def test_rows_of_a_picture_that_gave_way_are_put_back(make_grounder, backend, two_before):
    grounder = make_grounder(**two_before)
    for shade in (1, 2, 1, 2, 2, 1):
        grounder.ground(make_picture(shade), MUG)
    assert looks(backend) == ["vision-8", "vision-8"]
    # Each is saved once, when the other takes its place for the first time.
    assert backend.saved == [16, 16]
    assert backend.put == [16, 16, 16]
    # Two rows are run of what is all there.
    assert prompts(backend) == [(0, 16), (2, 14), (14, 2), (14, 2), (14, 2), (14, 2)]


def test_without_memory_no_picture_is_kept(make_grounder, backend):
    grounder = make_grounder(keep=0)
    view = grounder.look(make_picture(1))
    for _ in range(2):
        view.ground(MUG)
    for shade in (1, 2, 1):
        grounder.ground(make_picture(shade), MUG)
    # The view is its owner's; the others are looked at each time they come.
    assert looks(backend) == ["vision-8"] * 4
    assert backend.saved == backend.put == []


def test_memory_stays_below_the_limit_over_many_pictures(make_grounder, backend, monkeypatch):
    grounder = make_grounder(keep=1)
    monkeypatch.setattr("gap_runtime.grounding.view.View.count_bytes", lambda _: 100_000)
    most = []
    for number in range(500):
        grounder.ground(make_picture(number % 50), MUG)
        most.append(grounder._views.count_bytes())
    assert max(most) <= 2**20
    assert most[-1] > 2**20 - 200_000
    # Ten fit of fifty that take turns, so that each is looked at anew.
    assert len(looks(backend)) == 500
    for number in range(49, 44, -1):
        grounder.ground(make_picture(number), MUG)
    assert len(looks(backend)) == 500


def test_what_a_view_holds_is_counted(make_grounder, backend):
    grounder = make_grounder()
    view = grounder.look(make_picture(1))
    view.ground(MUG)
    grounder.ground(make_picture(2), MUG)
    assert backend.saved == [15]
    # The picture, pixels of 8 x 8, 8 tokens two wide, 8 indices and 16 positions, 15 slots.
    counted = [40 * 40 * 3, 3 * 8 * 8 * 4, 8 * 2 * 4, 8 * 8, 16 * 8, 15 * 16]
    assert view.count_bytes() == sum(counted)


def test_the_sum_is_that_of_all_views_and_only_few_are_measured(make_grounder, monkeypatch):
    """Rows are saved of one picture while another is asked about; ratios add to either."""
    grounder = make_grounder()
    measured = []
    count = View.count_bytes
    monkeypatch.setattr(
        "gap_runtime.grounding.view.View.count_bytes",
        lambda view: measured.append(view) or count(view),
    )
    views = [grounder.look(make_picture(shade)) for shade in range(9)]
    rng = np.random.default_rng(2)
    for number in range(60):
        before = len(measured)
        if number % 7 == 3:
            with pytest.raises(InputError):
                views[number % 9].ground("a </s> b")
        elif number % 2:
            views[rng.integers(9)].ground(MUG, ratio=(0.5, 0.75)[rng.integers(2)])
        else:
            grounder.ground(make_picture(int(rng.integers(9))), RED)
        assert len(measured) - before <= 3
        assert grounder.count_kept() == (9, sum(count(view) for view in views))


def test_rows_larger_than_the_memory_are_not_saved(make_grounder, backend, two_before):
    grounder = make_grounder(keep=15, **two_before)
    grounder._open_cache()._slot_bytes = 2**20
    for shade in (1, 2, 1):
        grounder.ground(make_picture(shade), MUG)
    # 16 slots of a MiB each. The vision stages still ran once.
    assert backend.saved == []
    assert looks(backend) == ["vision-8"] * 2
    assert prompts(backend) == [(0, 16), (2, 14), (2, 14)]


def test_a_pruner_that_reads_the_phrase_looks_for_each(make_grounder, backend, told_by_clip):
    view = make_grounder(**told_by_clip).look(make_picture(1))
    for phrase in (MUG, MUG, RED):
        view.ground(phrase, ratio=0.75)
    assert looks(backend) == ["text", "vision-4"] * 3
    assert prompts(backend) == [(0, 11), (0, 11), (0, 12)]
    pixels = [inputs["pixels"] for name, inputs in backend.calls if name == "vision-4"]
    assert pixels[0] is pixels[1] is pixels[2]


def test_a_phrase_before_the_picture_is_not_taken_for_another(make_grounder, backend, manifest):
    """The text before the picture need not be the same for every phrase."""
    prompt = dataclasses.replace(
        manifest.prompt, template="{phrase} <image> Where ? ASSISTANT:", image_token=None
    )
    view = make_grounder(prompt=prompt).look(make_picture(1))
    for phrase in ("mug", "red", "red"):
        view.ground(phrase)
    assert prompts(backend) == [(0, 12), (0, 12), (10, 2)]


def test_a_phrase_of_no_use_leaves_nothing_behind(make_grounder, backend):
    view = make_grounder().look(make_picture(1))
    for phrase in ("", "mug " * 30, 7):
        with pytest.raises(InputError):
            view.ground(phrase)
    assert backend.calls == []
    assert view.outputs == {}


def test_after_a_call_that_failed_nothing_is_taken_for_known(make_grounder, backend):
    grounder = make_grounder()
    view = grounder.look(make_picture(1))
    view.ground(MUG)
    session = grounder._open_cache().session
    run = session.run

    def fail(*_):
        raise EngineError("out of memory")

    session.run = fail
    with pytest.raises(EngineError):
        view.ground(MUG)
    session.run = run
    view.ground(MUG)
    assert prompts(backend) == [(0, 15), (0, 15)]


def make_output(start=0):
    """What is known of a picture of eight tokens, whose position IDs begin there."""
    return VisionOutput(
        pixels=np.zeros(0),
        visual_tokens=np.zeros((1, 8, 2)),
        kept_index=np.zeros((1, 8)),
        position_ids=np.arange(start, start + 30)[None],
        preprocess_ms=0,
        vision_ms=0,
    )


class Sized:
    """A session with profiles, as an engine has."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def fit(self, rows):
        return min((size for size in self.sizes if size >= rows), default=None)


@pytest.mark.parametrize(
    ("capacity", "sizes", "held"),
    [
        (22, (1, 8, 16), [0, 14, 2]),
        # No profile behind the text that is the same, but one behind the picture.
        (21, (1, 8, 16), [0, 10, 2]),
        # None behind the picture, but one behind the text before it.
        (22, (1, 16), [0, 2, 2]),
        (22, tuple(range(16, 22)), [0, 2, 2]),
        # None behind anything.
        (18, (1, 17), [0, 0, 0]),
    ],
)
def test_engines_compute_again_what_has_no_profile_behind_it(manifest, capacity, sizes, held):
    cache = PromptCache(Sized(*sizes), manifest.cache, capacity=capacity, limit=0)

    first = make_output()
    found = []
    for output in (first, first, make_output()):
        with cache.begin([2, 5], output, [3] * 6) as slots:
            found.append(slots)
    assert found == held


def test_an_odd_number_of_rows_is_taken_where_only_that_fits_an_engine(manifest):
    """One token before the picture and eight of it: three rows have no profile, two have one."""
    cache = PromptCache(Sized(2, 15), manifest.cache, capacity=15, limit=0)
    output = make_output()
    found = []
    for _ in range(2):
        with cache.begin([2], output, [3] * 6) as slots:
            found.append(slots)
    assert found == [0, 13]


def test_other_positions_before_the_picture_are_other_rows(manifest):
    cache = PromptCache(Sized(16), manifest.cache, capacity=99, limit=0)
    found = []
    for start in (0, 0, 5):
        output = make_output(start)
        with cache.begin([2, 5], output, [3] * 6) as slots:
            found.append(slots)
    assert found == [0, 2, 0]


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize(
    ("suffix", "behind"),
    [
        # The whole prompt once more, a longer one, another one, and none of it; slots behind one
        # token before the picture, and behind two.
        ((3, 4, 5, 6, 7), (12, 12)),
        ((3, 4, 5, 6, 7, 8, 9, 9), (12, 14)),
        ((3, 4, 9, 9, 9, 9), (10, 12)),
        ((9, 9, 9), (8, 10)),
        ((3,), (8, 8)),
    ],
)
def test_what_is_run_begins_behind_an_even_number_of_rows(manifest, prefix, suffix, behind):
    """Two rows of a prompt are run at least, and its last row is never taken from another's."""
    cache = PromptCache(Sized(*range(1, 40)), manifest.cache, capacity=99, limit=0)
    output = make_output()
    found = []
    for each in ((3, 4, 5, 6, 7), suffix):
        with cache.begin([2] * prefix, output, each) as slots:
            found.append(slots)
    assert found == [0, behind[prefix - 1]]


def test_after_rows_that_could_not_be_put_back_nothing_is_taken_for_known(
    make_grounder, backend, two_before
):
    grounder = make_grounder(**two_before)
    for shade in (1, 2):
        grounder.ground(make_picture(shade), MUG)
    session = grounder._open_cache().session
    put = session.put_slots

    def fail(_):
        raise EngineError("out of memory")

    session.put_slots = fail
    with pytest.raises(EngineError):
        grounder.ground(make_picture(1), MUG)
    session.put_slots = put
    # Rows of the second picture may be written over in part.
    grounder.ground(make_picture(2), MUG)
    assert prompts(backend) == [(0, 16), (2, 14), (14, 2)]
    assert backend.put == [16]


def test_the_public_names():
    import gap_runtime

    assert gap_runtime.View is View


def test_the_command_takes_several_phrases(make_bundle, backend, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    make_picture(1).save(photo)
    command = ["ground", str(make_bundle()), str(photo), MUG, RED]
    painted = tmp_path / "out.png"
    assert main([*command, "--draw", str(painted), "--keep-pictures", "0"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{name}: 10.0 10.0 30.0 20.0" for name in (MUG, RED)]
    assert looks(backend) == ["vision-8"]
    assert Image.open(painted).size == (480, 480)
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["phrase"] for each in found] == [MUG, RED]
    assert found[1]["milliseconds"]["vision"] == 0
    assert main([*command[:-1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["phrase"] == MUG
    assert main([*command, "--keep-pictures", "much"]) == 2
    assert "expected MiB, a whole number of 0 or more" in capsys.readouterr().err


def test_one_drawing_cannot_show_other_patches_for_each_phrase(
    make_bundle, backend, told_by_clip, tmp_path, capsys
):
    photo, painted = tmp_path / "photo.png", tmp_path / "out.png"
    make_picture(1).save(photo)
    open_stage = backend.open_stage

    def open_unsteady(*arguments):
        stage = open_stage(*arguments)
        run = stage.run

        def run_unsteadily(inputs):
            given = run(inputs)
            if "kept_index" in given:
                given["kept_index"] = given["kept_index"] + len(backend.calls)
            return given

        stage.run = run_unsteadily
        return stage

    backend.open_stage = open_unsteady
    command = ["ground", str(make_bundle(**told_by_clip)), str(photo), MUG, RED]
    assert main([*command, "--ratio", "0.75", "--draw", str(painted)]) == 2
    assert "each phrase kept other patches" in capsys.readouterr().err
    assert main([*command, "--ratio", "0.5", "--draw", str(painted)]) == 0
