"""Checkpoints and parts that lie elsewhere: around a folder, on the hub, in its cache."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from makers.stored import assert_values, save_state, some_tensors
from tools.refusals import refuse_checkpoint

from gap_export.checkpoint.index import open_checkpoint, open_part
from gap_export.checkpoint.tensor import read_tensor
from gap_export.config.load import load_config
from gap_export.errors import CheckpointError
from gap_runtime.errors import ConfigError


def test_an_unreachable_hub_points_at_local_folders(monkeypatch):
    def offline(*args, **kwargs):
        del args, kwargs
        raise LocalEntryNotFoundError("Cannot find the requested files.\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refuse_checkpoint("some-org/some-model")
    assert message.startswith("some-org/some-model: ")
    assert "Cannot find the requested files." in message
    assert "local checkpoint folder" in message


@pytest.mark.parametrize(
    "name", ["nothing-here", "./nothing/here", "/nothing/here", "weights/nothing.pth"]
)
def test_what_cannot_be_a_hub_id_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert refuse_checkpoint(name) == f"{name}: no such checkpoint folder or file"


def hub_cache(folder, home):
    """The folder as the hub client keeps it: names that are links into a store of blobs."""
    blobs, snapshot = home / "blobs", home / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for k, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{k:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{k:064x}")
    return snapshot


def test_links_of_a_hub_cache_are_followed_to_real_files(sharded, tmp_path_factory):
    snapshot = hub_cache(sharded, tmp_path_factory.mktemp("cache"))
    for key, location in open_checkpoint(str(snapshot)).tensors.items():
        assert not location.file.is_symlink()
        assert location.file.parent.name == "blobs"
        assert torch.equal(read_tensor(location), some_tensors()[key])


class Hub:
    """A hub that gives one folder as the cache has it after a download of some of its files."""

    def __init__(self, snapshot):
        self.snapshot, self.asked = snapshot, []
        self.files = {path.name for path in snapshot.iterdir()}
        self.away = snapshot.parent / "away"
        self.away.mkdir()
        for name in self.files:
            (snapshot / name).rename(self.away / name)

    def __call__(self, hub_id, *, revision, allow_patterns, ignore_patterns=None):
        self.asked.append((hub_id, revision))
        paths = sorted(path.name for path in self.away.iterdir())
        for name in huggingface_hub.utils.filter_repo_objects(
            paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (self.away / name).rename(self.snapshot / name)
        return str(self.snapshot)


def test_a_downloaded_checkpoint_keeps_its_id_and_commit(sharded, tmp_path_factory, monkeypatch):
    (sharded / "pytorch_model.bin").write_bytes(b"")
    (sharded / "merges.txt").write_bytes(b"")
    hub = Hub(hub_cache(sharded, tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    checkpoint = open_checkpoint("some-org/some-model", "main")
    assert hub.asked == [("some-org/some-model", "main")]
    assert (checkpoint.hub_id, checkpoint.revision) == ("some-org/some-model", "0123abc")
    assert [path.name for path in hub.away.iterdir()] == ["pytorch_model.bin"]


def test_torch_files_are_downloaded_where_there_are_no_others(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(some_tensors(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"")
    hub = Hub(hub_cache(folder, tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    checkpoint = open_checkpoint("some-org/some-model")
    assert hub.asked == [("some-org/some-model", None), ("some-org/some-model", "0123abc")]
    assert len(list(hub.away.iterdir())) == 3
    assert checkpoint.tensors["a.weight"].file.parent.name == "blobs"
    assert_values(checkpoint, some_tensors())


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("parts/clip", "here/parts/clip"),
        ("org/clip", "home/main/org/clip"),
        ("org/clip", "home/main/clip"),
        ("org/clip", "home/org/clip"),
        ("org/clip", "home/clip"),
        ("../clip", "home/clip"),
        ("/nowhere/clip", "home/clip"),
        ("./clip", "home/main/clip"),
    ],
)
def test_a_part_is_looked_for_around_the_checkpoint(tmp_path, monkeypatch, location, place):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for folder in ("here", "home/main", place):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    save_state(tmp_path / place, {"w": torch.ones(2)})
    part = open_part(location, tmp_path / "home/main", "clip")
    assert part.folder.resolve() == (tmp_path / place).resolve()
    assert (part.hub_id, list(part.tensors)) == (None, ["w"])


def test_a_part_may_be_a_file(tmp_path):
    save_state(tmp_path, {"w": torch.ones(2)}, "eva_vit_g.pth")
    (tmp_path / "main").mkdir()
    part = open_part("/elsewhere/eva_vit_g.pth", tmp_path / "main", "vision")
    assert part.tensors["w"].file.name == "eva_vit_g.pth"


@pytest.mark.parametrize("location", ["", ".hidden", "/nowhere/eva.pth", "org/eva.pth"])
def test_a_part_that_is_nowhere(tmp_path, monkeypatch, location):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError) as caught:
        open_part(location, tmp_path / "main", "vision")
    message = str(caught.value)
    assert "no such part 'vision'" in message
    assert "--set parts.vision=DIR" in message
    assert "\n" not in message
    if location:
        assert str(tmp_path / "main" / Path(location).name) in message
        assert str(tmp_path / Path(location).name) in message


def test_a_part_of_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_state(folder, {"w": torch.ones(2)})
    hub = Hub(hub_cache(folder, tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    part = open_part("openai/clip", tmp_path / "main", "clip")
    assert (part.hub_id, part.revision, list(part.tensors)) == ("openai/clip", "0123abc", ["w"])


def test_a_part_that_the_hub_does_not_give(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        del args, kwargs
        raise LocalEntryNotFoundError("Cannot find the requested files.\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as caught:
        open_part("openai/clip", tmp_path / "main", "clip")
    message = str(caught.value)
    assert message.startswith("openai/clip: cannot be fetched from the hub (Cannot find")
    for place in ("main/openai/clip", "main/clip", "openai/clip", "clip"):
        assert str(tmp_path / place) in message
    assert "--set parts.clip=DIR" in message
    assert "\n" not in message


def test_an_offline_hub_is_told_in_whole_sentences(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refuse_checkpoint("some-org/no-such-model")
    assert message == (
        "some-org/no-such-model: it is not in the cache here, and HF_HUB_OFFLINE is set; unset it "
        "to download; a local checkpoint folder works too: gap-export FOLDER, or --checkpoint "
        "FOLDER"
    )


def test_a_long_reason_of_the_hub_is_not_cut(monkeypatch):
    reason = (
        "Cannot find an appropriate cached snapshot folder for the specified revision on the "
        "local disk and outgoing traffic has been disabled"
    )

    def offline(*args, **kwargs):
        del args, kwargs
        raise LocalEntryNotFoundError(f"{reason}. To enable repo look-ups, pass 'x=False'.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert f"({reason}); a local" in refuse_checkpoint("some-org/some-model")


@pytest.mark.parametrize("has_head", [True, False])
def test_the_top_of_a_hub_cache(sharded, tmp_path_factory, has_head):
    home = tmp_path_factory.mktemp("cache") / "models--x--y"
    hub_cache(sharded, home)
    (home / "snapshots" / "0000000").mkdir()
    (home / "refs").mkdir()
    if has_head:
        (home / "refs" / "main").write_text("0000000", encoding="utf-8")
    chosen = home / "snapshots" / ("0000000" if has_head else "0123abc")
    said = f"{home}: the top of a hub cache; give the files' folder: {chosen}"
    assert refuse_checkpoint(home) == said
    with pytest.raises(ConfigError) as caught:
        load_config(str(home), {})
    assert str(caught.value) == said


def test_a_folder_of_checkpoints(tmp_path):
    for name in ("checkpoint-100", "checkpoint-200"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    said = "no config.json in it, but in 2 of its folders; give one, as"
    assert refuse_checkpoint(tmp_path) == f"{tmp_path}: {said} {tmp_path / 'checkpoint-200'}"
