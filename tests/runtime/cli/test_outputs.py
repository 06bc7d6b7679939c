"""No command writes over what it reads, or into it: one line, exit code 2, and nothing changed."""

import json
from hashlib import sha256

import pytest
from PIL import Image

from gap_runtime.bundle.files import require_apart
from gap_runtime.cli.main import main
from gap_runtime.errors import InputError

COMMANDS = [
    "check {bundle} --html {bundle}/manifest.json",
    "check {bundle} --html {bundle}/new.html",
    "check {link} --html {bundle}/manifest.json",
    "check {bundle} --html {link}/new.html",
    "ground {bundle} {data}/a.png mug --draw {bundle}/new.png",
    "ground {bundle} {data}/a.png mug --draw {data}/a.png",
    "ground {bundle} {data}/a.png {data}/b.png --phrase mug --draw {bundle}/drawn",
    "ground {bundle} {data}/a.png {data}/b.png --phrase mug --draw {data}",
    "evaluate {bundle} --data {data}/asked.jsonl --html {bundle}/manifest.json",
    "evaluate {bundle} --data {data}/asked.jsonl --html {data}/asked.jsonl",
    "evaluate {bundle} --data {data}/asked.jsonl --html {data}/a.png",
    "evaluate {bundle} --data {data}/asked.jsonl --out {bundle}/new.jsonl",
    "evaluate {bundle} --data {data}/asked.jsonl --out {data}/new --html {data}/new",
    "evaluate {bundle} --data {data}/asked.jsonl --out {data}/asked.jsonl --resume",
    "evaluate {bundle} --data {data}/asked.jsonl --compare {data}/x.jsonl --html {data}/x.jsonl",
    "watch {bundle} {data} --phrase mug --jsonl {bundle}/new.jsonl",
    "watch {bundle} {data} --phrase mug --out {bundle}/new.mp4",
    "build {bundle} --target cuda --timing-cache {bundle}/manifest.json",
    "triton {bundle} --out {bundle}/models",
]


def digest(folder):
    """Every name under a folder, with the bytes of files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path)] = sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_where_it_reads(
    make_samples, make_bundle, manifest, answer_with, tmp_path, capsys, command
):
    backend = answer_with(11)
    bundle, data, link = (tmp_path / name for name in ("made", "data", "link"))
    make_bundle(**make_samples(manifest)).rename(bundle)
    link.symlink_to(bundle)
    data.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 20), (200, 200, 200)).save(data / name)
    line = {"image": "a.png", "phrase": "the mug", "box": [1, 2, 30, 15]}
    (data / "asked.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (data / "x.jsonl").write_text("", encoding="utf-8")
    before = digest(tmp_path)
    assert len(before) > 8
    words = [word.format(bundle=bundle, data=data, link=link) for word in command.split()]
    assert main(words) == 2
    lines = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert len(lines) == 1
    assert "which is read" in lines[0] or "is read, too" in lines[0] or "lie there" in lines[0]
    assert digest(tmp_path) == before
    assert backend.calls == []


def test_a_place_is_known_by_every_name(tmp_path):
    """By its own name, and by where it leads."""
    home, store = tmp_path / "bundle", tmp_path / "store"
    home.mkdir()
    store.mkdir()
    (store / "blob").write_text("x", encoding="utf-8")
    (home / "manifest.json").symlink_to(store / "blob")
    (tmp_path / "hard").hardlink_to(store / "blob")
    (tmp_path / "beside").symlink_to(home / "new")
    for path in (home, home / "manifest.json", home / "a" / ".." / "new", tmp_path / "beside"):
        with pytest.raises(InputError, match="give --out another place"):
            require_apart(path, [home], "--out")
    with pytest.raises(InputError, match="would be written over; give --out"):
        require_apart(tmp_path / "hard", [store / "blob"], "--out")
    for path in (tmp_path / "bundle-2", tmp_path, tmp_path / ("y" * 999)):
        require_apart(path, [home, home / "manifest.json", "hub:a/b"], "--out")
