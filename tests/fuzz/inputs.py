"""What users give: pictures, phrases, data, answers, settings, arguments."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz import mutations
from fuzz.bundles import PHRASE, forbidden, remove
from fuzz.outcome import WrongResultError, run_line
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.cli.main import main
from gap_runtime.grounding.grounder import Grounder
from gap_runtime.pictures.boxes import PictureFrame, parse_boxes
from gap_runtime.pictures.load import load_picture, open_picture

FORMATS = (
    *("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "ICO", "ICNS", "PCX", "PPM", "TGA", "AVIF"),
    *("JPEG2000", "MPO", "SGI", "QOI", "DDS", "IM", "XBM", "DIB", "MSP", "SPIDER"),
)
MODES = {"MSP": "1", "XBM": "1", "SPIDER": "F", "ICNS": "RGBA", "ICO": "RGBA"}


def encode_picture(rng):
    """Bytes of a picture in some format, and the format."""
    name = rng.choice(FORMATS)
    values = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (20, 30, 3), np.uint8)
    picture = Image.fromarray(values).convert(MODES.get(name, "RGB"))
    if name not in MODES and name in {"PNG", "TIFF", "WEBP"}:
        picture = picture.convert(rng.choice(("RGB", "RGBA", "L", "RGB")))
    options = {}
    if rng.random() < 0.3 and name in {"PNG", "JPEG", "TIFF", "WEBP", "AVIF"}:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 300))
        options["exif"] = exif
    if rng.random() < 0.1 and name in {"GIF", "TIFF", "PNG", "WEBP"}:
        options |= {"save_all": True, "append_images": [picture.copy()]}
    buffer = io.BytesIO()
    picture.save(buffer, name, **options)
    return name, buffer.getvalue()


def pictures(case):
    """Picture files of every format, damaged."""
    folder = case.folder.parent

    def make(rng):
        name, data = encode_picture(rng)
        data = mutations.change_bytes(data, rng) if rng.random() < 0.95 else data
        way = rng.choice(("bytes",) * 20 + ("file",) * 20 + ("pipe", "folder", "unreadable"))
        path = folder / f"picture.{name.lower()}"

        def run():
            if way == "bytes":
                return check_picture(open_picture(data))
            remove(path)
            if way == "pipe":
                os.mkfifo(path)
            elif way == "folder":
                path.mkdir()
            else:
                path.write_bytes(data)
                path.chmod(0 if way == "unreadable" else 0o600)
            with forbidden(on=way == "unreadable"):
                return check_picture(load_picture(path))

        return f"{name} {way}", run

    return make


def check_picture(picture):
    if picture.mode != "RGB" or min(picture.size) < 1:
        raise WrongResultError(f"a picture of mode {picture.mode}, size {picture.size}")


def phrases(case):
    """Phrases of any characters, in this process and on the command line."""
    grounder = Grounder(Bundle.open(case.source), keep_pictures=2)
    view = grounder.look(load_picture(case.picture))

    def make(rng):
        phrase = mutations.change_text(PHRASE, rng)
        if rng.random() < 0.1:
            phrase = rng.choice(("--", "-", "--x", "-1", "", " ", "--json", "--ratio"))

        def run():
            if rng.random() < 0.7:
                return check_grounding(view.ground(phrase, ratio=rng.choice((0, 0.5))))
            argument = phrase.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
            return run_line(main, ("ground", case.source, case.picture, argument))

        return repr(phrase[:60]), run

    return make


def check_grounding(found):
    for box in found.boxes:
        if not (box.x0 < box.x1 and box.y0 < box.y1):
            raise WrongResultError(f"a box without area: {box}")


def boxes(case):
    """Answers of any text."""
    from gap_runtime.bundle.validation import read_manifest

    spec = read_manifest(case.source).box
    frames = (PictureFrame.whole((30, 20)), PictureFrame.padded((20, 30), (64, 64)))

    def make(rng):
        text = mutations.change_text("[0.10, 0.20, 0.30, 0.40] [0.5,0.5,0.9,0.9]", rng)

        def run():
            found = parse_boxes(text, spec, rng.choice(frames))
            for box in found.boxes:
                if not (0 <= box.x0 < box.x1 and 0 <= box.y0 < box.y1):
                    raise WrongResultError(f"a box outside its picture: {box}")

        return repr(text[:60]), run

    return make


RECORDS = [
    {"image": f"{k}.png", "phrase": phrase, "box": [1, 2, 9, 9], "id": str(k)}
    for k, phrase in enumerate(("a mug", "the spoon", "red square", "left one"))
]


def data_files(case):
    """Data of the user, in lines, in a list, in a table, and in published formats."""
    from gap_runtime.evaluation.data import open_data

    folder = case.folder.parent / "data"
    folder.mkdir(exist_ok=True)
    for record in RECORDS:
        Image.new("RGB", (20, 10)).save(folder / record["image"])
    refer = {
        "jsonl": "\n".join(map(json.dumps, RECORDS)),
        "json": json.dumps(RECORDS),
        "csv": "image,phrase,x0,y0,x1,y1\n" + "0.png,a mug,1,2,9,9\n" * 2,
    }
    internvl = {"image": "0.png", "sent": "a", "bbox": [1, 2, 9, 9], "width": 20, "height": 10}
    shikra = {"img_path": "0.png", "expression": "a", "bbox": [1, 2, 9, 9], "height": 10}
    spot = {
        "img_filename": "0.png",
        "bbox": [1, 2, 4, 4],
        "instruction": "x",
        "data_type": "icon",
        "data_source": "web",
    }
    mdetr = {
        "images": [
            {
                "file_name": "0.png",
                "id": 1,
                "height": 10,
                "width": 20,
                "caption": "a mug",
                "original_id": 1,
                "dataset_name": "refcoco",
            }
        ],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 4, 4]}],
    }
    more = [
        ("jsonl", internvl),
        ("jsonl", {**shikra, "width": 20}),
        ("json", [spot]),
        ("json", mdetr),
    ]

    def make(rng):
        if rng.random() < 0.5:
            suffix, plain = rng.choice(more)
            changed, place = mutations.change_plain(plain, rng)
            text = mutations.write_plain(changed, rng)
        else:
            suffix = rng.choice(("jsonl", "json", "csv"))
            text, place = mutations.change_bytes(refer[suffix].encode(), rng), suffix
            if rng.random() < 0.5 and suffix != "csv":
                changed, place = mutations.change_plain(RECORDS, rng)
                text = mutations.write_plain(changed, rng)
                if suffix == "jsonl" and isinstance(changed, list):
                    text = b"\n".join(mutations.write_plain(each, rng) for each in changed)
        path = folder / f"mine.{suffix}"

        def run():
            remove(path)
            way = rng.randrange(60)
            if way == 0:
                os.mkfifo(path)
            elif way == 1:
                path.mkdir()
            else:
                path.write_bytes(text)
            data = open_data(str(path))
            for each in data.expressions:
                box = each.box
                if not (box.x0 < box.x1 and abs(box.x1) < 1e12) or not each.phrase.strip():
                    raise WrongResultError(f"accepted {each}")

        return f"{suffix} {place}", run

    return make


def answers(case):
    """A file of answers changed, then gone on with, scored and compared."""
    folder = case.folder.parent / "answers"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.jsonl"
    base = ("evaluate", case.source, "--data", "refshapes:test", "--limit", "6", "--ratio", "0.5")
    if not whole.exists():
        run_line(main, (*base, "--out", whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    true = run_line(main, (*base, "--out", whole, "--resume", "--json"))[1]
    path = folder / "mine.jsonl"

    def make(rng):
        changed = list(lines)
        k = rng.randrange(len(lines))
        if rng.random() < 0.7:
            plain, place = mutations.change_plain(json.loads(lines[k]), rng)
            changed[k] = mutations.write_plain(plain, rng) + b"\n"
        else:
            place = rng.choice(("twice", "gone", "bytes", "cut"))
            if place == "twice":
                changed.insert(k, lines[k])
            elif place == "gone":
                del changed[k]
            elif place == "bytes":
                changed[k] = mutations.change_bytes(lines[k], rng)
            else:
                changed = changed[: k + 1]
                changed[k] = changed[k][: rng.randrange(len(lines[k]))]

        def run():
            path.write_bytes(b"".join(changed))
            found = run_line(main, (*base, "--out", path, "--resume", "--json"))[1]
            if plain_scores(found) != plain_scores(true):
                raise WrongResultError(f"line {k}: {place}: other figures, and nothing said")

        return f"line {k}: {place}", run

    return make


def plain_scores(text):
    """The figures of an evaluation that no clock and no draft can change."""
    names = ("protocol", "phrases", "unasked", "hits", "mean_iou", "unparsable", "degenerate")
    return [[each[name] for name in names] for each in json.loads(text)["scores"]]


def arguments(case):
    """Words of the command line in any order."""
    from gap_export.cli.main import main as export_main

    words = (
        *("info", "check", "ground", "bench", "evaluate", "build", "doctor", "list", "count"),
        *("export", "refshapes", "positions", "--ratio", "0.5", "--keep", "32", "--json", "--out"),
        *("--help", "--version", "--backend", "onnxruntime", "tensorrt", "openvino", "--limit"),
        *("1", "-1", "nan", "inf", "1e400", "--data", "refshapes:test", "--dry-run", "--target"),
        *("cpu", "--set", "prune.seed=1", "x=[", "--html", "--draw", "x.png", "--", "-", ""),
        *("a\nb", "\x1b[31m", "\0", "é", "x" * 5000, "--no-reference", "--positions", "compact"),
        str(case.source),
        str(case.picture),
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
    )
    folder = case.folder.parent / "here"
    folder.mkdir(exist_ok=True)

    def make(rng):
        chosen = [rng.choice(words) for _ in range(rng.randrange(1, 6))]
        is_export = rng.random() < 0.5
        if is_export and "--dry-run" not in chosen:
            chosen.append("--dry-run")

        def run():
            before = Path.cwd()
            os.chdir(folder)
            try:
                return run_line(export_main if is_export else main, chosen)
            finally:
                os.chdir(before)
                shutil.rmtree(folder)
                folder.mkdir()

        return f"{'export' if is_export else 'runtime'} {[each[:40] for each in chosen]}", run

    return make
