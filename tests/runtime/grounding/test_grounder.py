"""What a Grounder asks of which graph, against a backend that writes it down."""

import dataclasses
import io
import threading
import time
import weakref

import numpy as np
import pytest
from PIL import Image

from gap_runtime.backends import resolve_backend
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.errors import BundleError, ConfigError, EngineError, InputError
from gap_runtime.grounding.grounder import Grounder

BOX_TOKEN = 11
SQUARE = Image.new("RGB", (40, 40), (200, 100, 50))
WIDE = Image.new("RGB", (40, 20), (200, 100, 50))
TALL = Image.new("RGB", (20, 40), (200, 100, 50))


@pytest.fixture
def backend(answer_with):
    return answer_with(BOX_TOKEN)


@pytest.fixture
def make_grounder(make_bundle, backend):
    """A function that opens a bundle with changes on the fake backend; it keeps no pictures."""
    assert backend.opened == []
    return lambda **changes: Grounder(Bundle.open(make_bundle(**changes)), keep_pictures=0)


def inputs_of(backend, name):
    """Inputs of each run of a stage."""
    return [inputs for stage, inputs in backend.calls if stage == name]


def test_graphs_are_loaded_when_they_are_needed_and_once(make_grounder, backend):
    grounder = make_grounder()
    assert backend.opened == []
    for ratio in (None, 0.75, 0.5, 0.75):
        grounder.ground(SQUARE, "the red mug", ratio=ratio)
    assert backend.opened == ["vision-8", "decoder", "vision-4"]
    assert [name for name, _ in backend.calls] == ["vision-8", "vision-4", "vision-8", "vision-4"]


@pytest.mark.parametrize("wrong", [-1, 10**9])
@pytest.mark.parametrize(
    ("output", "said"), [("position_ids", "position IDs"), ("kept_index", "kept patches")]
)
def test_indices_outside_of_what_they_count_are_refused(
    make_grounder, backend, monkeypatch, output, said, wrong
):
    """Behind the rotary tables, onnxruntime 1.24 would read memory that is not theirs."""
    grounder, opening = make_grounder(), backend.open_stage

    def open_broken(*arguments):
        opened = opening(*arguments)
        run = opened.run

        def run_broken(inputs):
            given = run(inputs)
            given[output][0, -1] = wrong
            return given

        opened.run = run_broken
        return opened

    monkeypatch.setattr(backend, "open_stage", open_broken)
    with pytest.raises(EngineError, match=rf"vision-8\.onnx gave {said} from .*, expected 0 to"):
        grounder.ground(SQUARE, "the red mug")


def test_where_there_is_no_room_other_graphs_give_way(make_grounder, backend, monkeypatch):
    """As on a device of 8 GB, whose ratios and canvases have towers of their own."""
    grounder, opening, loaded = make_grounder(), backend.open_stage, []

    def open_alone(bundle, stage, device):
        if loaded and loaded[-1]() is not None:
            raise EngineError("no room")
        opened = opening(bundle, stage, device)
        loaded.append(weakref.ref(opened))
        return opened

    monkeypatch.setattr(backend, "open_stage", open_alone)
    for ratio in (0.5, 0.75, 0.5):
        grounder.ground(SQUARE, "the red mug", ratio=ratio)
    assert [name for name in backend.opened if name != "decoder"] == [
        *("vision-8", "vision-4", "vision-8")
    ]


def test_what_cannot_be_opened_alone_is_refused(make_grounder, backend, monkeypatch):
    def refuse(*_):
        raise EngineError("no room")

    monkeypatch.setattr(backend, "open_stage", refuse)
    with pytest.raises(EngineError, match="no room"):
        make_grounder().ground(SQUARE, "the red mug")


def test_prompt_is_spliced_around_the_visual_tokens(make_grounder, backend):
    make_grounder().ground(SQUARE, "the mug")
    embeddings, positions, slot, row = backend.decoded[0]
    # Table row k is (2k, 2k + 1); visual tokens count on from 0.
    text = [[2 * k, 2 * k + 1] for k in (4, 5, 6, 8, 9, 3)]
    visual = np.arange(16).reshape(8, 2).tolist()
    assert embeddings.tolist() == [[[4, 5], *visual, *text]]
    assert positions.tolist() == [list(range(15))]
    assert (slot, row) == (0, [1 + 8 + 6 - 1])


def test_extra_token_takes_a_slot_behind_the_kept_ones(make_grounder, backend, with_extra):
    grounding = make_grounder(**with_extra).ground(SQUARE, "the mug")
    embeddings, positions, _, row = backend.decoded[0]
    visual = np.arange(18).reshape(9, 2).tolist()
    assert embeddings.shape == (1, 16, 2)
    assert embeddings[0, 1:10].tolist() == visual
    assert embeddings[0, 10].tolist() == [8, 9]  # "Where"
    assert positions.shape == (1, 16)
    assert row == [1 + 9 + 6 - 1]
    # The answer goes on behind it, in slot and position.
    _, step_positions, slot, _ = backend.decoded[1]
    assert (slot, step_positions.tolist()) == (16, [[16]])
    assert (grounding.kept, len(grounding.kept_index)) == (8, 8)


def test_ratio_without_an_extra_token_has_no_slot_for_it(make_grounder, backend, with_extra):
    make_grounder(**with_extra).ground(SQUARE, "the mug", ratio=0.75)
    embeddings, _, _, row = backend.decoded[0]
    assert embeddings.shape == (1, 11, 2)
    assert row == [1 + 4 + 6 - 1]


@pytest.mark.parametrize(
    ("picture", "ratio", "stage", "kept", "patches"),
    [
        (WIDE, None, "vision-wide-7", 7, 14),
        (WIDE, 0.25, "vision-wide-11", 11, 14),
        (TALL, None, "vision-tall-8", 8, 16),
        (TALL, 0.25, "vision-tall-12", 12, 16),
    ],
)
def test_picture_and_ratio_choose_the_vision_graph(
    make_grounder, backend, tiled, picture, ratio, stage, kept, patches
):
    grounding = make_grounder(**tiled).ground(picture, "the mug", ratio=ratio)
    assert backend.opened == [stage, "decoder"]
    assert (grounding.kept, grounding.patches) == (kept, patches)
    assert backend.decoded[0][0].shape == (1, 1 + kept + 6, 2)
    assert inputs_of(backend, stage)[0]["pixels"].shape == (1, 3, 3, 8, 8)


def test_grounders_own_ratio_holds_for_every_bucket(make_bundle, backend, tiled):
    grounder = Grounder(Bundle.open(make_bundle(**tiled)), ratio=0.25)
    assert [grounder.ground(each, "mug").kept for each in (TALL, WIDE)] == [12, 11]
    assert backend.opened == ["vision-tall-12", "decoder", "vision-wide-11"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("cuda", "onnxruntime:cuda"),
        ("gpu", "onnxruntime:cuda"),
        ("cpu", "onnxruntime:cpu"),
        ("trt", "tensorrt"),
        ("onnxruntime:cpu", "onnxruntime:cpu"),
        ("onxruntime", "onxruntime"),
    ],
)
def test_backends_have_short_names(given, name):
    assert resolve_backend(given) == name


@pytest.mark.usefixtures("backend")
def test_a_count_is_kept_of_every_picture_or_refused(make_bundle, tiled):
    bundle = Bundle.open(make_bundle(**tiled))
    grounder = Grounder(bundle, keep=8)
    assert grounder.ground(TALL, "mug").kept == 8
    with pytest.raises(ConfigError, match="no ratio keeps 8; have 7 of 14, 11 of 14"):
        grounder.ground(WIDE, "mug")
    assert grounder.ground(TALL, "mug", keep=12).kept == 12
    assert grounder.ground(WIDE, "mug", ratio=0.5).kept == 7
    with pytest.raises(ConfigError, match="no ratio keeps 9"):
        Grounder(bundle, keep=9)


def test_picture_of_no_bucket_loads_nothing(make_grounder, backend, tiled):
    grounder = make_grounder(**tiled)
    with pytest.raises(InputError, match=r"have wide, tall; export with --set image\.canvas="):
        grounder.ground(SQUARE, "the mug")
    assert backend.opened == []


def test_unknown_ratio_of_a_bucket_loads_nothing(make_grounder, backend, tiled):
    grounder = make_grounder(**tiled)
    with pytest.raises(ConfigError, match=r"no ratio 0\.75; have 0\.5, 0\.25; export with"):
        grounder.ground(WIDE, "the mug", ratio=0.75)
    assert backend.opened == []


def test_bundle_without_a_tokenizer_takes_no_phrase(make_bundle, manifest, backend):
    prompt = dataclasses.replace(manifest.prompt, tokenizer=None, image_token=None)
    bundle = Bundle.open(make_bundle(prompt=prompt))
    with pytest.raises(BundleError, match="no tokenizer in it"):
        Grounder(bundle)
    assert backend.opened == []


def test_prompt_is_encoded_apart_where_there_is_no_image_token(make_grounder, backend, manifest):
    prompt = dataclasses.replace(manifest.prompt, image_token=None)
    make_grounder(prompt=prompt).ground(SQUARE, "the mug")
    embeddings, _, _, row = backend.decoded[0]
    assert embeddings[0, 0].tolist() == [4, 5]
    assert embeddings[0, 9].tolist() == [8, 9]
    assert row == [1 + 8 + 6 - 1]


def test_text_graph_tells_the_phrase_to_a_vision_graph_that_reads_it(
    make_grounder, backend, told_by_clip
):
    make_grounder(**told_by_clip).ground(SQUARE, "the red mug", ratio=0.75)
    assert [name for name, _ in backend.calls] == ["text", "vision-4"]
    (asked,) = inputs_of(backend, "text")
    # The words' own tokenizer has no end token to add, so the phrase is only padded with it.
    assert asked["text_ids"].tolist() == [[6, 7, 8, 10, 10, 10]]
    (seen,) = inputs_of(backend, "vision-4")
    assert set(seen) == {"pixels", "text_features"}
    assert seen["text_features"].tolist() == [[0, 1, 2]]


def test_vision_graph_that_reads_no_phrase_is_told_none(make_grounder, backend, told_by_clip):
    make_grounder(**told_by_clip).ground(SQUARE, "the red mug", ratio=0.5)
    assert backend.opened == ["vision-8", "decoder"]
    assert [set(inputs) for inputs in inputs_of(backend, "vision-8")] == [{"pixels"}]


def test_text_graph_is_loaded_once_and_run_for_every_phrase(make_grounder, backend, told_by_clip):
    grounder = make_grounder(**told_by_clip)
    for phrase in ("mug", "the mug", "mug"):
        grounder.ground(SQUARE, phrase, ratio=0.75)
    assert backend.opened.count("text") == 1
    ids = [inputs["text_ids"][0, :2].tolist() for inputs in inputs_of(backend, "text")]
    assert ids == [[8, 10], [6, 8], [8, 10]]


def test_tokenizers_of_prompt_and_phrase_do_not_share_their_truncation(
    make_grounder, backend, told_by_clip
):
    # Six tokens are the text graph's, the prompt has eight.
    assert told_by_clip["phrase"].length == 6
    make_grounder(**told_by_clip).ground(SQUARE, "the red mug", ratio=0.75)
    assert backend.decoded[0][3] == [1 + 4 + 7 - 1]


def test_phrase_by_embeddings_is_the_mean_of_unit_rows(make_grounder, backend, told_by_embeddings):
    make_grounder(**told_by_embeddings).ground(SQUARE, "the red mug", ratio=0.75)
    assert backend.opened == ["vision-4", "decoder"]
    (seen,) = inputs_of(backend, "vision-4")
    rows = [np.array([2.0 * k, 2.0 * k + 1]) for k in (6, 7, 8)]
    expected = sum(row / np.sqrt((row**2).sum()) for row in rows) / 3
    assert seen["text_features"] == pytest.approx(expected[None], abs=1e-6)


def make_table(**rows):
    """Bytes of an embedding table of zeros but for some rows, by token."""
    table = np.zeros((12, 2), "<f4")
    for name, row in rows.items():
        table[int(name[1:])] = row
    return table.tobytes()


@pytest.mark.parametrize(
    ("phrase", "features"),
    [
        ("the", [0.6, 0.8]),
        ("red", [0, -1]),
        # The mean of directions, however long the rows are, and not made a unit again.
        ("the red", [0.3, -0.1]),
        ("the the red", [0.4, 0.6 / 3]),
        # A row of zeros has no direction; it counts in the mean and makes no number of it bad.
        ("mug", [0, 0]),
        ("the mug", [0.3, 0.4]),
        ("  the \n red ", [0.3, -0.1]),
    ],
)
def test_phrase_by_embeddings_in_numbers(
    make_grounder, backend, told_by_embeddings, phrase, features
):
    weights = make_table(_6=(3000, 4000), _7=(0, -1e-3))
    make_grounder(weights=weights, **told_by_embeddings).ground(SQUARE, phrase, ratio=0.75)
    (seen,) = inputs_of(backend, "vision-4")
    assert seen["text_features"].shape == (1, 2)
    assert seen["text_features"] == pytest.approx(np.array([features]), abs=1e-6)


def test_vision_graph_that_reads_no_phrase_is_given_no_embeddings(
    make_grounder, backend, told_by_embeddings
):
    make_grounder(**told_by_embeddings).ground(SQUARE, "the red mug", ratio=0.5)
    assert [set(inputs) for inputs in inputs_of(backend, "vision-8")] == [{"pixels"}]


@pytest.mark.parametrize("phrase", ["", "the </s> mug", "the red red red mug"])
def test_phrase_that_cannot_be_used_runs_no_graph(make_grounder, backend, told_by_clip, phrase):
    with pytest.raises(InputError):
        make_grounder(**told_by_clip).ground(SQUARE, phrase, ratio=0.75)
    assert backend.calls == []


def save(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_a_picture_may_come_in_any_form(make_grounder, backend, tmp_path):
    values = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    picture = Image.fromarray(values)
    (tmp_path / "photo.png").write_bytes(save(picture))
    mirrored = np.ascontiguousarray(values[..., ::-1])
    path = tmp_path / "photo.png"
    given = (picture, values, mirrored[..., ::-1], save(picture), path, str(path))
    grounder = make_grounder()
    for image in given:
        grounder.ground(image, "the mug")
    pixels = [inputs["pixels"] for inputs in inputs_of(backend, "vision-8")]
    assert len(pixels) == len(given)
    assert all(np.array_equal(each, pixels[0]) for each in pixels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 6), np.uint8), r"uint8 array \[8, 6\]; expected uint8 \[height, width, 3\]"),
        (np.zeros((3, 8, 6), np.uint8), r"uint8 array \[3, 8, 6\]"),
        (np.zeros((8, 6, 4), np.uint8), r"uint8 array \[8, 6, 4\]"),
        (np.zeros((8, 6, 3), np.float32), r"float32 array \[8, 6, 3\]"),
        (np.zeros((0, 6, 3), np.uint8), r"uint8 array \[0, 6, 3\]"),
        (np.broadcast_to(np.uint8(0), (90000, 90000, 3)), "90000x90000 pixels"),
        (b"no picture", "the bytes given as picture: not a picture"),
        (Image.new("RGB", (0, 6)), "a picture of 0x6 pixels"),
        ([[0]], "a picture of type list; expected a path, bytes"),
        (None, "a picture of type NoneType"),
    ],
)
def test_a_picture_that_is_none(make_grounder, backend, image, message):
    with pytest.raises(InputError, match=message):
        make_grounder().ground(image, "the mug")
    assert backend.opened == []


def test_a_phrase_and_a_bundle_of_a_wrong_type(make_grounder, tmp_path):
    grounder = make_grounder()
    with pytest.raises(InputError, match="a phrase of type dict; expected a str"):
        grounder.ground(SQUARE, {"the": "mug"})
    with pytest.raises(InputError, match="a phrase of type list; expected a str"):
        grounder.look(SQUARE).ground(["the mug"])
    with pytest.raises(ConfigError, match=r"open it first: Grounder\(Bundle.open"):
        Grounder(str(tmp_path))
    with pytest.raises(ConfigError, match="a ratio of type str; expected a number"):
        grounder.ground(SQUARE, "the mug", ratio="0.5")


@pytest.mark.parametrize("given", [-1, 0.5, float("nan"), "256", None])
def test_memory_for_pictures_of_no_sense(make_bundle, backend, given):
    with pytest.raises(ConfigError, match=r"^keep_pictures .*: expected MiB, 0 or more$"):
        Grounder(Bundle.open(make_bundle()), keep_pictures=given)
    assert backend.opened == []


def test_a_backend_that_is_none(make_bundle):
    with pytest.raises(ConfigError, match="a backend of type list; expected a name"):
        Grounder(Bundle.open(make_bundle()), ["onnxruntime"])


def test_threads_take_turns(make_grounder, backend, monkeypatch):
    """Graphs write where their cache and outputs lie; another's answer would be made of them."""
    grounder, opening = make_grounder(), backend.open_stage
    running, seen, errors = [], [], []

    def open_slow(*arguments):
        opened = opening(*arguments)
        run = opened.run

        def run_slowly(inputs):
            running.append(1)
            time.sleep(0.01)
            seen.append(len(running))
            running.pop()
            return run(inputs)

        opened.run = run_slowly
        return opened

    monkeypatch.setattr(backend, "open_stage", open_slow)

    def ask():
        try:
            for _ in range(3):
                grounder.ground(SQUARE, "the mug")
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (seen, errors) == ([1] * 12, [])
