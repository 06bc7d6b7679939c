"""Readers on files made in the exact formats, the line of text that names them, hostile files."""

import builtins
import contextlib
import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from gap_runtime.errors import ConfigError, GapError, InputError, UnknownNameError
from gap_runtime.evaluation import data as data_module
from gap_runtime.evaluation import refshapes256
from gap_runtime.evaluation.data import open_data
from gap_runtime.evaluation.refshapes import draw_scene
from gap_runtime.evaluation.splits import compare_counts

COCO = "COCO_train2014_000000581857.jpg"
SIZE = (40, 30)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "train2014"
    folder.mkdir()
    Image.new("RGB", SIZE, (9, 9, 9)).save(folder / COCO)
    return folder


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path, *records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def make_refs(split="val"):
    return [
        {
            "ref_id": 7,
            "ann_id": 11,
            "image_id": 581857,
            "category_id": 1,
            # The object's number at the end, which the picture's name has not.
            "file_name": "COCO_train2014_000000581857_16.jpg",
            "split": split,
            "sent_ids": [3, 4],
            "sentences": [
                {"sent": "the red mug", "raw": "The red mug", "tokens": ["the"], "sent_id": 3},
                {"sent": "mug  left", "raw": "mug left!", "tokens": ["mug"], "sent_id": 4},
            ],
        },
        {"ref_id": 8, "ann_id": 11, "image_id": 581857, "split": "train", "sentences": []},
    ]


INSTANCES = {
    "images": [{"id": 581857, "file_name": COCO, "width": 40, "height": 30}],
    "annotations": [{"id": 11, "image_id": 581857, "bbox": [10.5, 5, 20, 10], "area": 200}],
}


def write_refer(folder, refs, *, by="unc", protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"refs({by}).p").open("wb") as file:
        pickle.dump(refs, file, protocol=protocol)
    write_json(folder / "instances.json", INSTANCES)
    return folder


def facts(data):
    return [(e.key, e.phrase, e.box, e.size, e.target) for e in data.expressions]


BOX = (10.5, 5.0, 30.5, 15.0)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refer_pickles(tmp_path, images, protocol):
    write_refer(tmp_path / "data" / "refcoco", make_refs(), protocol=protocol)
    data = open_data(f"refcoco:val@{tmp_path / 'data'}", images=images)
    assert (data.name, data.format) == ("refcoco:val", "refer")
    assert facts(data) == [
        ("3", "the red mug", BOX, SIZE, "7"),
        ("4", "mug left", BOX, SIZE, "7"),
    ]
    assert data.expressions[0].picture.load().size == SIZE
    assert data.expressions[0].picture.key == COCO
    assert "2 phrases about 1 objects" in data.notes[0]
    assert "10,834 about 3,811" in data.notes[0]


def test_refer_pickles_of_python_2(tmp_path, images):
    """Text there is bytes: opcode U, which no newer Python writes."""
    folder = write_refer(tmp_path / "refcoco+", make_refs())
    text = (folder / "refs(unc).p").read_bytes()
    as_bytes = text.replace(
        b"X" + struct.pack("<I", 11) + b"the red mug",
        b"U" + bytes([11]) + b"the red m\xc3\xa9"[:11],
    )
    assert as_bytes != text
    (folder / "refs(unc).p").write_bytes(as_bytes)
    data = open_data(f"refcoco+:val@{folder}", images=images)
    assert data.expressions[0].phrase == "the red m\u00e9"


def test_who_split_it(tmp_path, images):
    write_refer(tmp_path / "refcocog", make_refs("test"), by="umd")
    write_refer(tmp_path / "refcocog", make_refs("val"), by="google")
    assert len(open_data(f"refcocog:test@{tmp_path}", images=images).expressions) == 2
    google = open_data(f"refcocog:val@{tmp_path},by=google", images=images)
    # Google's split has counts of its own that nobody compares with UMD's.
    assert google.notes == ()
    with pytest.raises(InputError, match=r"no split 'val' in it; have test, train"):
        open_data(f"refcocog:val@{tmp_path}", images=images)


def test_minigpt_v2(tmp_path, images):
    records = [
        {
            "img_id": "COCO_train2014_000000581857_16",
            "sents": "the red mug",
            "bbox": [10.5, 5, 20, 10],
            "height": 30,
            "width": 40,
        }
    ]
    path = write_json(tmp_path / "refcoco" / "refcoco_testA.json", records)
    for spec in (f"refcoco:testA@{tmp_path}", str(path), f"{path},format=minigpt-v2"):
        data = open_data(spec, images=images)
        assert data.format == "minigpt_v2"
        assert facts(data) == [("0", "the red mug", BOX, SIZE, "COCO_train2014_000000581857_16")]
        assert data.expressions[0].picture.key == COCO
    # The published script groups by img_id: one that names two boxes is said.
    write_json(path, [records[0], {**records[0], "bbox": [0, 0, 5, 5]}])
    assert "1 img_id name more than one box" in open_data(str(path), images=images).notes[0]


def test_internvl(tmp_path, images):
    record = {
        "image": f"data/refcoco/train2014/{COCO}",
        "sent": "the red mug",
        "bbox": [10.5, 5, 30.5, 15.0],
        "width": 40,
        "height": 30,
    }
    path = write_lines(tmp_path / "refcoco_val.jsonl", record, record)
    data = open_data(f"refcoco:val@{tmp_path}", images=images)
    assert data.format == "internvl"
    assert facts(data) == [(str(k), "the red mug", BOX, SIZE, "") for k in (1, 2)]
    # The folder of the pictures alone is enough.
    assert data.expressions[0].picture.load().size == SIZE
    assert open_data(str(path), images=images).sha256 == data.sha256


def test_shikra(tmp_path, images):
    record = {
        "img_path": COCO,
        "expression": "the red mug",
        "bbox": [10.5, 5, 30.5, 15.0],
        "dataset_name": "refcoco",
        "height": 30,
        "width": 40,
    }
    write_lines(tmp_path / "REC_refcocog_umd_test.jsonl", record)
    data = open_data(f"refcocog:test@{tmp_path}", images=images)
    assert data.format == "shikra"
    assert facts(data) == [("1", "the red mug", BOX, SIZE, "")]


def test_mdetr(tmp_path, images):
    value = {
        "images": [
            {
                "id": 0,
                "file_name": COCO,
                "caption": "the red mug",
                "width": 40,
                "height": 30,
                "original_id": 581857,
                "dataset_name": "refcoco",
            }
        ],
        "annotations": [{"id": 0, "image_id": 0, "bbox": [10.5, 5, 20, 10], "original_id": 11}],
        "categories": [],
    }
    path = write_json(tmp_path / "finetune_refcoco_val.json", value)
    data = open_data(f"refcoco:val@{tmp_path}", images=images)
    assert data.format == "mdetr"
    assert facts(data) == [("0", "the red mug", BOX, SIZE, "11")]
    write_json(path, {**value, "annotations": []})
    with pytest.raises(InputError, match="image 0: has 0 annotations"):
        open_data(str(path), images=images)


def pack(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_of_the_hub(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "question_id": f"{name}-16",
            "image": {"bytes": pack(Image.new("RGB", (40 + k, 30))), "path": COCO},
            "question": "Provide a short description.",
            "answer": sentences,
            "segmentation": [1.0, 2.0],
            "bbox": [10.5, 5.0, 20.0, 10.0],
            "iscrowd": 0,
            "file_name": COCO,
        }
        for k, (name, sentences) in enumerate([("a", ["the red mug", "mug left"]), ("b", ["it"])])
    ]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "val-00000-of-00001.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=1)
    for spec in (f"refcoco:val@{tmp_path}", str(path)):
        data = open_data(spec)
        assert data.format == "hub"
        assert facts(data) == [
            ("0/0/0/0", "the red mug", BOX, None, "a-16"),
            ("0/0/0/1", "mug left", BOX, None, "a-16"),
            ("0/1/0/0", "it", BOX, None, "b-16"),
        ]
        assert [e.picture.load().width for e in data.expressions] == [40, 40, 41]
        pickle.loads(pickle.dumps(data.expressions))
    assert "3 phrases about 2 objects" in open_data(f"refcoco:val@{tmp_path}").notes[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        open_data(str(path))
    parquet.write_table(arrow.table({"question": ["x"]}), path)
    with pytest.raises(InputError, match="no known format"):
        open_data(str(path))
    with pytest.raises(InputError, match="no column 'question_id'; have question"):
        open_data(f"{path},format=hub")


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def block(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", block)
    with pytest.raises(ConfigError, match=r"pip install 'gap-runtime\[evaluate\]'"):
        open_data(str(tmp_path / "x.parquet"))


def test_lines_of_your_own(images):
    path = write_lines(
        images / "mine.jsonl",
        {"image": COCO, "phrase": "the red mug", "box": [10.5, 5, 30.5, 15]},
        {"image": f"./{COCO}", "phrase": "mug", "box": [0, 0, 1, 1], "id": "b", "object": 4},
        {"image": COCO, "phrase": "it", "box": [0, 0, 1, 1], "width": 40, "height": 30},
    )
    data = open_data(str(path))
    assert (data.name, data.format, data.notes) == ("mine.jsonl", "plain", ())
    assert facts(data) == [
        ("1", "the red mug", BOX, None, ""),
        ("b", "mug", (0, 0, 1, 1), None, "4"),
        ("3", "it", (0, 0, 1, 1), SIZE, ""),
    ]
    # The same picture by another name is one picture.
    assert len({e.picture.key for e in data.expressions}) == 1
    assert len(open_data(str(path), limit=2).expressions) == 2
    assert open_data(str(path), limit=2).sha256 != data.sha256


@pytest.mark.parametrize(
    "text",
    [
        'image,phrase,box\n{0},the red mug,"[10.5, 5, 30.5, 15]"\n',
        "\ufeffphrase, image, x0,y0,x1,y1,id\nthe red mug,{0},10.5,5,30.5,15,\n",
        'image,phrase,box,width,height\r\n{0},"the red\nmug","10.5,5,30.5,15",40,30\r\n',
    ],
)
def test_a_table_of_your_own(images, text):
    path = images / "mine.csv"
    path.write_bytes(text.format(COCO).encode())
    (found,) = open_data(str(path)).expressions
    assert (found.phrase, found.box) == ("the red mug", BOX)
    assert found.picture.load().size == SIZE


def test_your_own_pictures_are_turned_upright_and_published_ones_are_not(images):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(images / COCO, exif=exif)
    own = {"image": COCO, "phrase": "it", "box": [0, 0, 1, 1]}
    published = {"image": COCO, "sent": "it", "bbox": [0, 0, 1, 1], "width": 40, "height": 30}
    (mine,) = open_data(str(write_lines(images / "a.jsonl", own))).expressions
    (theirs,) = open_data(str(write_lines(images / "b.jsonl", published))).expressions
    assert mine.picture.load().size == (30, 40)
    assert theirs.picture.load().size == (40, 30)


def test_the_generator():
    data = open_data("refshapes:test", limit=7)
    scene = draw_scene("test", 0)
    assert (data.name, data.format) == ("refshapes:test", "refshapes")
    first = data.expressions[0]
    assert (first.key, first.phrase) == ("test/0/0", scene.questions[0].phrase)
    assert first.box == scene.questions[0].box
    assert np.array_equal(first.picture.load(), scene.image)
    assert open_data("refshapes:test", limit=7).sha256 == data.sha256
    assert open_data("refshapes:val", limit=7).sha256 != data.sha256
    assert len(open_data("refshapes:test").expressions) == 1000


def test_the_generator_of_larger_pictures():
    data = open_data("refshapes-256:test", limit=5)
    scene = refshapes256.draw_scene("test", 0)
    assert (data.name, data.format) == ("refshapes-256:test", "refshapes_256")
    first = data.expressions[0]
    assert (first.phrase, first.box) == (scene.questions[0].phrase, scene.questions[0].box)
    assert np.array_equal(first.picture.load(), scene.image)
    with pytest.raises(UnknownNameError, match="did you mean test"):
        open_data("refshapes-256:best")


def test_counts_that_were_published():
    targets = [str(k % 1975) for k in range(5657)]
    assert compare_counts("refcoco", "testA", "", targets) is None
    assert compare_counts("refcoco", "testA", "unc", [""] * 5657) is None
    assert compare_counts("mine", "testA", "", targets) is None
    assert "5,656 phrases" in compare_counts("refcoco", "testA", "", targets[1:])
    assert "about 1 objects" in compare_counts("refcoco", "testA", "", ["x"] * 5657)


SPECS = [
    ("nowhere.jsonl", InputError, "no such file; expected a file, SET:SPLIT@PLACE"),
    ("refcoco:val", ConfigError, "'refcoco' needs a place"),
    ("refcoco:val@nowhere", InputError, "nowhere: no such file or folder"),
    ("refcoco:val@.", InputError, "no file of refcoco:val in it"),
    (".", ConfigError, "name the set"),
    ("refshapes:best", UnknownNameError, "did you mean test"),
    ("mine.jsonl,format=jsonl", UnknownNameError, "unknown format 'jsonl'"),
    ("mine.jsonl,speed=9", ConfigError, "'speed=9' is no setting; have format, by"),
    ("mine.jsonl,", ConfigError, "is no setting"),
    ("mine.txt", InputError, "ending is unknown; have .csv, .json"),
    ("odd.jsonl", InputError, "of no known format .*found the fields file, text"),
    ("empty.jsonl", InputError, "of no known format .*found nothing"),
]


@pytest.mark.parametrize(("spec", "kind", "part"), SPECS)
def test_what_cannot_be_read(tmp_path, monkeypatch, spec, kind, part):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "mine.jsonl", {"image": "a", "phrase": "b", "box": [0, 0, 1, 1]})
    write_lines(tmp_path / "odd.jsonl", {"file": 1, "text": 2})
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(kind, match=part) as caught:
        open_data(spec)
    assert "\n" not in str(caught.value)


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("refcoco:val", "a,b=c.jsonl", "a:b@c.jsonl"):
        path = write_lines(tmp_path / name, {"image": "a", "phrase": "b", "box": [0, 0, 1, 1]})
        if path.suffix:
            assert open_data(name).name == name
    with pytest.raises(InputError, match="the ending is unknown"):
        open_data("refcoco:val")


def test_a_set_in_two_formats_asks_which(tmp_path, images):
    write_json(tmp_path / "refcoco_val.json", [])
    write_lines(tmp_path / "refcoco_val.jsonl", {})
    with pytest.raises(ConfigError, match=r"choose one with ,format=internvl or ,format=minigpt"):
        open_data(f"refcoco:val@{tmp_path}", images=images)


GOOD = {"image": "a.png", "phrase": "b", "box": [0, 0, 1, 1]}
WRONG = [
    ({"image": "a.png", "phrase": "b"}, "no field 'box'; have image, phrase"),
    ({**GOOD, "phrase": " "}, "'phrase' is ' ', expected text"),
    ({**GOOD, "phrase": 7}, "'phrase' is 7, expected text"),
    ({**GOOD, "phrase": "x" * 10_001}, "expected text"),
    ({**GOOD, "image": None}, "'image' is None, expected the path"),
    ({**GOOD, "image": "a\0b"}, "expected the path"),
    ({**GOOD, "box": [0, 0, 1]}, "'box' is a list, expected four numbers"),
    ({**GOOD, "box": "0 0 1 1"}, "expected four numbers"),
    ({**GOOD, "box": [0, 0, 1, True]}, "expected four numbers"),
    ({**GOOD, "box": [0, 0, 1, float("nan")]}, "expected four numbers"),
    ({**GOOD, "box": [0, 0, 1, float("inf")]}, "expected four numbers"),
    ({**GOOD, "box": [0, 0, 1, 10**400]}, "an integer of 401 digits"),
    ({**GOOD, "box": [0, 0, 1, 10**30]}, "expected four numbers"),
    ({**GOOD, "box": [0, 0, 1, 1e308]}, "expected four numbers"),
    ({**GOOD, "box": [5, 0, 1, 1]}, "corners 5, 0, 1, 1, which span no area"),
    ({**GOOD, "box": [0, 0, 0, 1]}, "span no area"),
    ({**GOOD, "width": 0, "height": 5}, "'width' is 0, expected pixels"),
    ({**GOOD, "width": "9", "height": 5}, "'width' is '9', expected pixels"),
    ({**GOOD, "id": []}, "'id' is a list, expected a name"),
    ([1, 2], "found a list, expected a record"),
    ({**GOOD, "image": "/etc/passwd"}, "'/etc/passwd' lies outside the folder"),
    ({**GOOD, "image": "../../secret.png"}, "lies outside the folder"),
    ({**GOOD, "image": "a/../../b.png"}, "lies outside the folder"),
    ({**GOOD, "image": "."}, "lies outside the folder"),
]


@pytest.mark.parametrize(("record", "part"), WRONG)
def test_wrong_records_are_one_line_with_their_place(tmp_path, record, part):
    path = write_lines(tmp_path / "mine.jsonl", {**GOOD, "id": "x"}, record)
    with pytest.raises(InputError) as caught:
        open_data(str(path))
    assert part in str(caught.value)
    assert f"{path}:2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_paths_that_stay_in_the_folder_of_the_pictures(tmp_path, images):
    for name in (str(images / COCO), f"../train2014/{COCO}", f"x/../{COCO}"):
        path = write_lines(tmp_path / "mine.jsonl", {**GOOD, "image": name})
        (found,) = open_data(str(path), images=images).expressions
        assert found.picture.key == COCO
        assert found.picture.load().size == SIZE


def test_two_phrases_of_one_id(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", {**GOOD, "id": "2"}, GOOD)
    with pytest.raises(InputError, match="two phrases have the id '2'"):
        open_data(str(path))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("image,phrase\na,b\n", "no column 'box'; have image, phrase"),
        ("image;phrase;box\n", "of no known format"),
        ("image,phrase,box\na,b\n", "'box' is ''"),
        ('image,phrase,box\na,b,"1,2,3,x"\n', "'box' is 'x', expected numbers"),
        ("image,phrase,x0,y0,x1,y1\na,b,1,2,3,4,5\n", "more fields than"),
        ('image,phrase,box\na,"b\n', "not valid CSV"),
        ("image,phrase,box\n", "no phrase in it"),
        ("image,phrase,box,id\na,\xff,1,1\n", "not valid CSV"),
    ],
)
def test_wrong_tables(tmp_path, text, part):
    path = tmp_path / "mine.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=part) as caught:
        open_data(str(path))
    assert "\n" not in str(caught.value)


class Bomb:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (Bomb(os.system, "touch hacked"), "asks for '(posix|nt).system'"),
        (Bomb(eval, "open('hacked', 'w')"), "asks for '(__builtin__|builtins).eval'"),
        (Bomb(bytearray, 10**10), "asks for '(__builtin__|builtins).bytearray'"),
        (np.float64(1), "asks for 'numpy"),
    ],
)
def test_a_pickle_with_code_in_it_is_refused_by_name(tmp_path, monkeypatch, images, value, part):
    monkeypatch.chdir(tmp_path)
    refs = make_refs()
    refs[0]["split"] = value
    write_refer(tmp_path / "refcoco", refs)
    with pytest.raises(InputError, match=part):
        open_data(f"refcoco:val@{tmp_path}", images=images)
    assert not (tmp_path / "hacked").exists()


def test_a_pickle_may_hold_sets(tmp_path, images):
    refs = make_refs()
    refs[0]["sent_ids"] = {3, 4}
    write_refer(tmp_path / "refcoco", refs)
    assert len(open_data(f"refcoco:val@{tmp_path}", images=images).expressions) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02]",
        b"not a pickle",
        # Ten gigabytes of text that are not there; a place in the memo that would be 16 GB.
        b"\x80\x04\x8d" + struct.pack("<Q", 10**10) + b"abc.",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"].",
        b"\x80\x02\x82\x01.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02}.",
        b"\x80\x02]K\x01a.",
        b"(" * 5000 + b"t" * 4999 + b".",
    ],
)
def test_damaged_pickles(tmp_path, images, data):
    folder = write_refer(tmp_path / "refcoco", [])
    (folder / "refs(unc).p").write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_data(f"refcoco:val@{tmp_path}", images=images)
    assert "refs(unc).p" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_be_endless_text_is_not_shown(tmp_path, images):
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    refs = make_refs()
    refs[0]["split"] = value
    write_refer(tmp_path / "refcoco", refs)
    with pytest.raises(InputError, match="'split' is a list"):
        open_data(f"refcoco:val@{tmp_path}", images=images)


def test_json_that_is_none(tmp_path):
    for text in ("{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '"\\ud800', "\xff"):
        path = tmp_path / "mine.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError) as caught:
            open_data(str(path))
        assert len(str(caught.value)) < 400 + len(str(path))


def test_lines_are_read_one_by_one(tmp_path):
    """The first phrases of a file that could not be read as a whole."""
    path = write_lines(tmp_path / "mine.jsonl", GOOD, GOOD)
    with path.open("r+b") as file:
        file.truncate(10 * 2**30)
    assert len(open_data(str(path), limit=2).expressions) == 2
    with pytest.raises(InputError, match=r"mine.jsonl:3: the line is longer than 1,048,576 bytes"):
        open_data(str(path), limit=3)
    big = tmp_path / "mine.json"
    big.touch()
    os.truncate(big, 3 * 2**30)
    with pytest.raises(InputError, match="use a format of lines"):
        open_data(str(big))


def test_more_phrases_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MOST", 5)
    path = write_lines(tmp_path / "mine.jsonl", *[GOOD] * 9)
    with pytest.raises(InputError, match="more than 5 phrases; take some with --limit"):
        open_data(str(path))
    assert len(open_data(str(path), limit=5).expressions) == 5


def test_limits_and_folders(tmp_path):
    with pytest.raises(ConfigError, match="--limit 0"):
        open_data("refshapes:test", limit=0)
    with pytest.raises(InputError, match="no such folder of pictures"):
        open_data("refshapes:test", images=tmp_path / "nowhere")


def test_every_error_is_one_of_ours(tmp_path, images):
    """Records of every kind under every format: an error of ours or an answer."""
    values = [None, 0, "x", [], {}, [1], [[1]], {"id": 1}, [0, 0, 1, 1], True, 1e308]
    keys = ("image", "sent", "bbox", "img_path", "expression", "phrase", "box", "width", "id")
    for form in ("internvl", "shikra", "plain", "minigpt_v2", "mdetr"):
        for value in values:
            record = dict.fromkeys(keys, value)
            wholes = [value, [record], {"images": value, "annotations": value}]
            wholes += [{"images": [record], "annotations": [record]}]
            for whole in wholes:
                path = tmp_path / ("mine.json" if form in {"minigpt_v2", "mdetr"} else "m.jsonl")
                path.write_text(json.dumps(whole if path.suffix == ".json" else record) + "\n")
                with contextlib.suppress(GapError):
                    open_data(f"{path},format={form}", images=images)


def test_boxes_that_are_fractions_of_the_picture_are_asked_about(tmp_path):
    lines = [{"image": "a", "phrase": f"{k}", "box": [0.1, 0.2, 0.5, k]} for k in (0.75, 1)]
    write_lines(tmp_path / "mine.jsonl", *lines)
    with pytest.raises(InputError, match=r"within one pixel; are they fractions of the picture\?"):
        open_data(str(tmp_path / "mine.jsonl"))
    write_lines(tmp_path / "mine.jsonl", *lines, {**lines[0], "phrase": "c", "box": [0, 0, 9, 9]})
    assert len(open_data(str(tmp_path / "mine.jsonl")).expressions) == 3
