"""Plans of checkpoints of which no value is here: by packaged shapes, or by headers on a hub."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from benchmarks.shapes import dump_shapes
from gap_export.checkpoint.index import open_checkpoint
from gap_export.checkpoint.shapes import SHAPES_FILE, ShapeSource, expand_names
from gap_export.errors import CheckpointError
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request

LLAMA_7B, LLAMA_13B, MISTRAL_7B = 6_738_415_616, 13_015_864_320, 7_241_732_096
"""Published numbers of parameters."""
CLIP_L_336 = 303_507_456
"""Of CLIP's vision tower."""
MORE_7B = 2 * 64 * 4096 + CLIP_L_336 + 1025 * 4096 + 4097 * 4096
"""64 more tokens, the tower and the projector."""
# model: parameters of its own files, visual tokens of its largest bucket at least
NAMED = {
    "llava-1.5-7b": (LLAMA_7B + MORE_7B, 576),
    "llava-1.5-13b": (
        LLAMA_13B + 2 * 64 * 5120 + CLIP_L_336 + 1025 * 5120 + 5121 * 5120,
        576,
    ),
    "llava-next-vicuna-7b": (LLAMA_7B + MORE_7B + 4096, 576),
    "llava-next-mistral-7b": (MISTRAL_7B + MORE_7B + 4096, 576),
    "shikra-7b": (LLAMA_7B + 2 * 3 * 4096 + 1025 * 4096, 256),
    "minigpt-v2": (5633 * 4096 + 32 * 2 * 2 * 64 * 4096, 256),
    "qwen2.5-vl-3b": (3_754_622_976, 1296),
    "qwen2.5-vl-7b": (8_292_166_656, 1296),
    "qwen3-vl-2b": (2_127_532_032, 1036),
    "qwen3-vl-4b": (4_437_815_808, 1036),
    "qwen3-vl-8b": (8_767_123_696, 1036),
    # InternViT-300M, its projector and Qwen2.5-0.5B with a head of its own.
    "internvl3-1b": (938_193_024, 13 * 256),
    # SigLIP's 26 blocks and Qwen2-0.5B; the published file has 1.79 GB.
    "llava-onevision-qwen2-0.5b": (893_675_552, 729 + 40 * 55),
}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Nothing is in the hub's cache, and the hub is not to be asked."""

    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", refuse)


def test_the_packaged_shapes_are_what_makes_them_gives():
    assert SHAPES_FILE.read_text(encoding="utf-8") == dump_shapes()


def test_numbers_of_layers_are_written_out():
    assert expand_names({"a.{3}.b": [2], "c": []}) == {
        "a.0.b": [2],
        "a.1.b": [2],
        "a.2.b": [2],
        "c": [],
    }


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_is_planned_without_its_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = make_request(name, ratios=0.5, reference=False, out=tmp_path / "out")
    home = tmp_path / "home"
    home.mkdir()
    source = ShapeSource(home)
    assert source.is_packaged(request.named.config.checkpoint)
    plan = plan_export(request, source)
    parameters, tokens = NAMED[name]
    found = sum(
        tensor.length // (4 if tensor.dtype == "float32" else 2)
        for tensor in plan.checkpoint.tensors.values()
    )
    assert found == parameters
    assert max(entry.patches for entry in plan.entries) >= tokens
    assert plan.tokenizer is None
    # Sparse: names and shapes take room, values do not.
    files = [path for path in home.rglob("*") if path.is_file()]
    assert sum(path.stat().st_blocks * 512 for path in files) < 2**21
    assert not (tmp_path / "out").exists()


def test_what_is_here_is_not_taken_from_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    source = ShapeSource(tmp_path)
    assert source.is_packaged("minigpt-v2")
    (tmp_path / "minigpt-v2").mkdir()
    assert not source.is_packaged("minigpt-v2")
    assert not source.is_packaged("llava-hf/llava-1.5-7b-hf", "0123abc")
    assert not source.is_packaged("./nowhere")


class Hub(BaseHTTPRequestHandler):
    """The hub's HTTP interface for one repository that lies in a folder."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder, sent, *arguments):
        self.folder, self.sent = folder, sent
        super().__init__(*arguments)

    def log_message(self, *_):
        """Nothing on the screen."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        path = self.path.partition("?")[0].strip("/").split("/")
        if "tree" in path:
            files = [
                {"type": "file", "path": each.name, "size": each.stat().st_size, "oid": "0" * 40}
                for each in sorted(self.folder.iterdir())
            ]
            self.reply(200, json.dumps(files).encode(), with_body=with_body)
            return
        if path[:2] == ["api", "models"]:
            names = sorted(each.name for each in self.folder.iterdir())
            facts = {"id": "some/model", "modelId": "some/model", "private": False, "tags": []}
            facts |= {"sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            self.reply(200, json.dumps(facts).encode(), with_body=with_body)
            return
        file = self.folder / path[-1]
        if "resolve" not in path or not file.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
            return
        data, status, headers = file.read_bytes(), 200, {"Accept-Ranges": "bytes"}
        headers |= {"ETag": f'"{file.name}"', "X-Repo-Commit": self.commit}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            whole = len(data)
            data, status = data[int(first) : int(last) + 1], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
        if with_body:
            self.sent.append((file.name, len(data)))
        self.reply(status, data, headers, with_body=with_body)

    def reply(self, status, data, headers=None, *, with_body):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def serve():
    """A function that serves a folder as `some/model`: the address, and what was sent."""
    servers = []

    def start(folder):
        sent = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, sent))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(address, home, *arguments):
    """`gap-export` in a process of its own, as the hub's library reads its address once."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    code = "import sys; from gap_export.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_of_a_hub_id_only_headers_are_fetched(make_llava_checkpoint, serve, tmp_path):
    folder = make_llava_checkpoint(
        tmp_path / "model", width=96, heads=6, image_size=70, max_shard_size="300KB"
    )
    weights = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert len(weights) > 1
    address, sent = serve(folder)
    arguments = ["--ratio", "0.5", "--dry-run", "--json", "--set", "prompt.answer=8"]
    done = ask(address, tmp_path / "home", "some/model", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    got = {name: sum(size for each, size in sent if each == name) for name in weights}
    # The library asks for the first 100,000 bytes, which hold any usual header.
    assert all(0 < got[name] <= 100_001 for name in weights)
    assert sum(got.values()) < sum(weights.values())
    cached = {path.suffix for path in (tmp_path / "home").rglob("*")}
    assert ".json" in cached
    assert ".safetensors" not in cached
    # The same plan as that of the whole files.
    whole = plan_export(make_request(folder, ratios=0.5, settings={"prompt.answer": 8}))
    assert found["checkpoint"] == "some/model"
    assert found["weights_bytes"] == whole.weights_bytes
    assert found["layout"]["prefix"] == whole.layout.prefix
    assert found["layout"]["suffix"] == whole.layout.suffix


def test_a_repository_without_safetensors_is_refused_in_a_line(
    make_llava_checkpoint, serve, tmp_path
):
    folder = make_llava_checkpoint(tmp_path / "model", image_size=70)
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    address, sent = serve(folder)
    done = ask(address, tmp_path / "home", "some/model", "--dry-run")
    assert done.returncode == 3
    line = " ".join(done.stderr.split()).rpartition("error: ")[2]
    assert line.startswith("some/model: has no safetensors")
    assert "Traceback" not in done.stderr
    assert not any(name.endswith(".bin") for name, _ in sent)


def test_a_hub_that_cannot_be_reached_points_at_folders(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"some/model: .*no network.*--checkpoint FOLDER"):
        open_checkpoint("some/model", fetch=ShapeSource(tmp_path))
