"""Ref-L4, RefCOCO's reviewed labels and ScreenSpot on small files in exactly their formats."""

import json
import random
import re

import pytest
from PIL import Image

from gap_runtime.errors import ConfigError, GapError, InputError
from gap_runtime.evaluation.data import open_data
from gap_runtime.evaluation.readers.ref_l4 import name_size
from gap_runtime.evaluation.splits import COUNTS, compare_counts
from gap_runtime.pictures.boxes import Box

# The example on the set's own page.
REF_L4 = {
    "id": 1,
    "caption": "Within the central picture frame of the three, an antique camera is present.",
    "bbox": [580.5, 179.5, 93.5, 112.0],
    "bbox_area": 10472.0,
    "bbox_id": "o365_527361",
    "ori_category_id": "o365_64",
    "image_id": "o365_922765",
    "height": 741,
    "width": 1024,
    "file_name": "objects365_v2_00922765.jpg",
    "is_rewrite": True,
    "split": "val",
}
SCREENSHOT = "pc_ede36f9b-1154-4f76-b7f8-c15d7d3f9b6e.png"
SCREENSPOT_V2 = {
    "img_filename": SCREENSHOT,
    "bbox": [910, 78, 44, 34],
    "instruction": "close this window",
    "data_type": "icon",
    "data_source": "windows",
}
SCREENSPOT_PRO = {
    "img_filename": "android_studio_mac/screenshot_2024-11-28_15-16-55.png",
    "bbox": [1774, 1586, 2113, 1618],
    "instruction": "modify the highlights of the photo",
    "instruction_cn": "\u4fee\u6539",
    "id": "android_studio_macos_0",
    "application": "android_studio",
    "platform": "macos",
    "img_size": [3840, 2160],
    "ui_type": "icon",
    "group": "Dev",
}


def write_parquet(path, *rows, **options):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(list(rows)), path, **options)
    return path


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def save(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def facts(data):
    return [(e.key, e.box, e.size, e.target, e.part, e.wrong) for e in data.expressions]


def make_ref_l4(folder):
    other = {**REF_L4, "id": 2, "bbox": [0.0, 0.0, 128.0, 128.0], "caption": "a  wall"}
    write_parquet(folder / "ref-l4-val.parquet", REF_L4, other, row_group_size=1)
    write_parquet(folder / "ref-l4-test.parquet", {**REF_L4, "id": 0, "split": "test"})
    save(folder / "images" / REF_L4["file_name"], (1024, 741))
    return folder


def test_ref_l4(tmp_path):
    make_ref_l4(tmp_path)
    data = open_data(f"ref-l4:val@{tmp_path}")
    assert (data.name, data.format) == ("ref-l4:val", "ref_l4")
    size, target = (1024, 741), "o365_527361"
    camera = ("1", (580.5, 179.5, 674.0, 291.5), size, target, "small", None)
    assert facts(data) == [camera, ("2", (0, 0, 128, 128), size, target, "medium", None)]
    assert data.expressions[0].phrase == REF_L4["caption"]
    assert data.expressions[1].phrase == "a wall"
    assert data.expressions[0].picture.load().size == size
    assert "2 phrases; the published split has 13,420, so" in data.notes[0]
    # Papers quote both splits together.
    both = open_data(f"ref-l4:all@{tmp_path}")
    assert [e.key for e in both.expressions] == ["1", "2", "0"]
    assert "45,341" in both.notes[0]
    # A file alone, with and without its split.
    path = tmp_path / "ref-l4-test.parquet"
    assert open_data(str(path)).format == "ref_l4"
    assert len(open_data(f"ref-l4:test@{path}").expressions) == 1
    with pytest.raises(InputError, match="row 0: is of split 'test', expected 'val'"):
        open_data(f"ref-l4:val@{path}")


def test_sizes_of_ref_l4():
    for side, name in ((127.9, "small"), (128, "medium"), (256, "medium"), (256.1, "large")):
        assert name_size(Box(0, 0, side, side)) == name


def test_pictures_that_nobody_unpacked(tmp_path):
    folder = make_ref_l4(tmp_path / "data")
    picture = folder / "images" / REF_L4["file_name"]
    picture.unlink()
    (folder / "images.tar.gz").touch()
    with pytest.raises(
        InputError, match=r"images.tar.gz: the pictures are still packed"
    ) as caught:
        open_data(f"ref-l4:val@{folder}")
    assert "--images" in str(caught.value)
    # The archive holds them without a folder, so that they may lie beside the data too.
    picture.parent.rmdir()
    save(folder / REF_L4["file_name"], (1024, 741))
    assert open_data(f"ref-l4:val@{folder}").expressions[0].picture.load().size == (1024, 741)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"bbox": [1.0, 2.0, 3.0]}, "row 1: 'bbox' is a list, expected four numbers"),
        ({"bbox": [1.0, 2.0, -3.0, 4.0]}, "row 1: 'bbox' has the corners 1, 2, -2, 6"),
        ({"bbox": None}, "row 1: 'bbox' is None"),
        ({"caption": " "}, "row 1: 'caption' is ' ', expected text"),
        ({"file_name": "../../x.jpg"}, "row 1: picture '../../x.jpg' lies outside"),
        ({"width": 0}, "row 1: 'width' is 0, expected pixels"),
        ({"id": None}, "row 1: 'id' is None"),
        ({"id": 7}, "two phrases have the id '7'"),
    ],
)
def test_wrong_rows_of_ref_l4(tmp_path, change, part):
    path = write_parquet(tmp_path / "x.parquet", {**REF_L4, "id": 7}, {**REF_L4, **change})
    with pytest.raises(InputError, match=re.escape(part)) as caught:
        open_data(str(path))
    assert "\n" not in str(caught.value)


def test_a_table_without_a_column(tmp_path):
    rest = {key: value for key, value in REF_L4.items() if key != "caption"}
    path = write_parquet(tmp_path / "x.parquet", rest)
    with pytest.raises(InputError, match="of no known format"):
        open_data(str(path))
    with pytest.raises(InputError, match="no column 'caption'; have id, bbox"):
        open_data(f"{path},format=ref-l4")


def test_damaged_tables_are_one_line(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", *({**REF_L4, "id": k} for k in range(50)))
    data = bytearray(whole.read_bytes())
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(3):
            broken[rng.randrange(4, len(data))] = rng.randrange(256)
        path = tmp_path / "b.parquet"
        path.write_bytes(broken[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        error = find_error(f"{path},format=ref-l4")
        refused += bool(error)
        assert not error or "b.parquet" in error
        assert "\n" not in error
    assert refused > 50


def find_error(spec):
    try:
        open_data(spec)
    except GapError as error:
        return str(error)
    return ""


def make_reviewed(qualities):
    """As published: an image record and an annotation for each phrase, with a review's mark."""
    name = "COCO_train2014_000000581857.jpg"
    return {
        "images": [
            {
                "id": k,
                "original_id": 581857,
                "file_name": name,
                "caption": f"the red mug {k}",
                "width": 40,
                "height": 30,
                "dataset_name": "refcoco",
                "tokens_negative": [[0, 5]],
            }
            for k in range(len(qualities))
        ],
        "annotations": [
            {
                "id": k,
                "image_id": k,
                "original_id": 11,
                "bbox": [10.5, 5, 20, 10],
                "tokens_positive": [[0, 5]],
                "caption_quality": quality,
            }
            for k, quality in enumerate(qualities)
        ],
        "categories": [],
    }


def test_reviewed_labels_say_which_phrases_are_wrong(tmp_path):
    folder = tmp_path / "refcocos_annotation_reviewed"
    path = write_json(folder / "refcoco+_testA_reviewed.json", make_reviewed([1, 0, 1]))
    for spec in (
        f"refcoco+:testA@{tmp_path}",
        f"refcoco+:testA@{folder}",
        f"refcoco+:testA@{path}",
        str(path),
    ):
        data = open_data(spec)
        assert data.format == "reviewed"
        assert [e.wrong for e in data.expressions] == [False, True, False]
        assert {(e.box, e.size, e.target) for e in data.expressions} == {
            ((10.5, 5, 30.5, 15), (40, 30), "11")
        }
    assert "the published split has 5,726" in open_data(f"refcoco+:testA@{path}").notes[0]
    # The same file without the review is MDETR's, and asks the same.
    value = make_reviewed([1, 0, 1])
    for annotation in value["annotations"]:
        del annotation["caption_quality"]
    plain = open_data(str(write_json(tmp_path / "finetune_refcoco+_testA.json", value)))
    assert (plain.format, plain.sha256) == ("mdetr", data.sha256)
    assert {e.wrong for e in plain.expressions} == {None}


@pytest.mark.parametrize(
    ("qualities", "part"),
    [
        ([1, 2], r"image 1: 'caption_quality' is 2, expected 0 \(wrong\) or 1"),
        ([1, None], "'caption_quality' is None, expected 0"),
        ([1, "0"], "'caption_quality' is '0', expected 0"),
        ([1, []], "'caption_quality' is a list, expected 0"),
    ],
)
def test_reviews_that_say_something_else(tmp_path, qualities, part):
    path = write_json(tmp_path / "a.json", make_reviewed(qualities))
    with pytest.raises(InputError, match=part):
        open_data(str(path))


def test_a_review_that_stops_midway(tmp_path):
    value = make_reviewed([1, 1])
    del value["annotations"][1]["caption_quality"]
    with pytest.raises(InputError, match="image 1: no field 'caption_quality'"):
        open_data(str(write_json(tmp_path / "a.json", value)))


def test_screenspot_v2(tmp_path):
    phone = {**SCREENSPOT_V2, "data_source": "ios", "data_type": "text", "bbox": [1, 2, 3, 4]}
    site = {**SCREENSPOT_V2, "data_source": "gitlab"}
    write_json(tmp_path / "screenspot_desktop_v2.json", [SCREENSPOT_V2, SCREENSPOT_V2])
    write_json(tmp_path / "screenspot_mobile_v2.json", [phone])
    with pytest.raises(InputError, match="no file of screenspot-v2:all in it"):
        open_data(f"screenspot-v2:all@{tmp_path}")
    web = write_json(tmp_path / "screenspot_web_v2.json", [site])
    save(tmp_path / "screenspotv2_image" / SCREENSHOT, (960, 540))
    data = open_data(f"screenspot-v2:all@{tmp_path}")
    assert data.format == "screenspot_v2"
    # Width and height, not a corner: 910 + 44, 78 + 34. The set holds the same twice.
    icon = ((910, 78, 954, 112), None, "", "desktop icon", None)
    assert facts(data) == [
        ("screenspot_desktop_v2/0", *icon),
        ("screenspot_desktop_v2/1", *icon),
        ("screenspot_mobile_v2/0", (1, 2, 4, 6), None, "", "mobile text", None),
        ("screenspot_web_v2/0", (910, 78, 954, 112), None, "", "web icon", None),
    ]
    assert data.expressions[0].picture.load().size == (960, 540)
    assert "4 phrases; the published split has 1,272" in data.notes[0]
    assert len(open_data(f"screenspot-v2:mobile@{tmp_path}").expressions) == 1
    assert open_data(str(web)).format == "screenspot_v2"


def test_screenshots_that_nobody_unpacked(tmp_path):
    path = write_json(tmp_path / "screenspot_web_v2.json", [SCREENSPOT_V2])
    (tmp_path / "screenspotv2_image.zip").touch()
    with pytest.raises(InputError, match=r"screenspotv2_image.zip: the pictures are still packed"):
        open_data(str(path))


def test_screenspot_pro(tmp_path):
    words = {**SCREENSPOT_PRO, "ui_type": "text", "group": "OS", "bbox": [1, 2, 3.5, 4]}
    first = write_json(tmp_path / "annotations" / "android_studio_macos.json", [SCREENSPOT_PRO])
    write_json(tmp_path / "annotations" / "windows_common.json", [words])
    save(tmp_path / "images" / SCREENSPOT_PRO["img_filename"], (3840, 2160))
    for spec in (f"screenspot-pro:all@{tmp_path}", f"screenspot-pro:all@{first.parent}"):
        data = open_data(spec)
        assert data.format == "screenspot_pro"
        # Corners, not width and height.
        assert facts(data) == [
            (
                "android_studio_macos/0",
                (1774, 1586, 2113, 1618),
                (3840, 2160),
                "",
                "Dev icon",
                None,
            ),
            ("windows_common/0", (1, 2, 3.5, 4), (3840, 2160), "", "OS text", None),
        ]
        assert data.expressions[0].picture.load().size == (3840, 2160)
        assert "2 phrases; the published split has 1,581" in data.notes[0]
    one = open_data(f"screenspot-pro:android_studio_macos@{tmp_path}")
    assert (len(one.expressions), one.notes) == (1, ())
    assert open_data(str(first)).format == "screenspot_pro"
    with pytest.raises(InputError, match="no file of screenspot-pro:blender in it"):
        open_data(f"screenspot-pro:blender@{tmp_path}")


@pytest.mark.parametrize(
    ("form", "record", "part"),
    [
        ("screenspot-pro", {**SCREENSPOT_PRO, "img_size": [3840]}, "'img_size' has 1 numbers"),
        ("screenspot-pro", {**SCREENSPOT_PRO, "img_size": [0, 9]}, "'width' is 0"),
        # The other set's boxes: a corner that lies before the first.
        ("screenspot-pro", {**SCREENSPOT_PRO, "bbox": [910, 78, 44, 34]}, "span no area"),
        ("screenspot-pro", {**SCREENSPOT_PRO, "group": None}, "'group' is None"),
        ("screenspot-pro", SCREENSPOT_V2, "no field 'ui_type'"),
        ("screenspot-v2", SCREENSPOT_PRO, "no field 'data_source'"),
        ("screenspot-v2", {**SCREENSPOT_V2, "bbox": [1, 2, 0, 4]}, "span no area"),
        ("screenspot-v2", {**SCREENSPOT_V2, "instruction": ""}, "'instruction' is ''"),
        ("screenspot-v2", "text", "found 'text', expected a record"),
    ],
)
def test_wrong_records_of_screenspot(tmp_path, form, record, part):
    path = write_json(tmp_path / "x.json", [record])
    with pytest.raises(InputError, match="record 0") as caught:
        open_data(f"{path},format={form}")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_boxes_as_fractions_are_another_set(tmp_path):
    """Copies of ScreenSpot on the hub have x0 y0 x1 y1 as fractions."""
    record = {**SCREENSPOT_V2, "bbox": [0.1, 0.2, 0.3, 0.4]}
    path = write_json(tmp_path / "x.json", [record])
    with pytest.raises(InputError, match="are they fractions of the picture"):
        open_data(str(path))


def test_files_that_hold_no_list(tmp_path):
    for form in ("screenspot-v2", "screenspot-pro", "minigpt-v2"):
        path = write_json(tmp_path / "x.json", {"a": 1})
        with pytest.raises(InputError, match=r"x\.json: holds a dict, expected a list"):
            open_data(f"{path},format={form}")
    for name in ("ref-l4", "screenspot-v2", "screenspot-pro"):
        with pytest.raises(ConfigError, match="needs a place"):
            open_data(f"{name}:all")


def test_counts_whose_objects_nobody_says():
    assert compare_counts("screenspot-v2", "all", "", [""] * 1272) is None
    assert compare_counts("ref-l4", "val", "", [f"{k % 9}" for k in range(13420)]) is None
    assert COUNTS["ref-l4", "val"][0] + COUNTS["ref-l4", "test"][0] == COUNTS["ref-l4", "all"][0]
