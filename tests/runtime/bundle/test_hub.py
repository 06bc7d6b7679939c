"""Push and pull with huggingface_hub's own client, against a stand-in of the hub."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("huggingface_hub")
hub_maker = pytest.importorskip("makers.hub", reason="the makers are not in this environment")

from huggingface_hub import constants

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.hub import parse_name, pull
from gap_runtime.bundle.license import UNKNOWN, License, find_license
from gap_runtime.bundle.manifest import Source
from gap_runtime.bundle.push import push as push_with_card
from gap_runtime.bundle.push import require_login
from gap_runtime.cli import main as cli
from gap_runtime.errors import BundleError, ConfigError, HubError
from gap_runtime.report.card import make_card

NAME = "org/tiny"
FREE = License(name="apache-2.0", said_by="a test")
LARGE = os.urandom(3 * hub_maker.SMALL)


def push(bundle, name, found):
    return push_with_card(bundle, name, found, make_card(bundle, name, found, None))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, as the place that huggingface_hub talks to, with a cache of its own."""
    found = hub_maker.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Tries again at once.
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", hub_maker.TOKEN)
    yield found
    found.close()


@pytest.fixture
def bundle(make_bundle):
    """Small files, and one that goes by LFS."""
    return Bundle.open(make_bundle(more={"extra.bin": LARGE}))


def contents(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("part_bytes", [None, 50_000])
def test_what_is_pulled_is_what_was_pushed(hub, bundle, part_bytes):
    hub.part_bytes = part_bytes
    pushed = push(bundle, parse_name(NAME), FREE)
    assert hub.repositories[NAME].branches["main"] == pushed.commit
    assert hub.count("PUT", "/lfs/") == (1 if part_bytes is None else 3)
    folder = pull(parse_name(f"{NAME}@{pushed.commit}"))
    names = [*bundle.manifest.files, "manifest.json"]
    assert contents(folder, names) == contents(bundle.folder, names)
    assert folder.name == pushed.commit
    again = Bundle.open(f"hub:{NAME}")
    assert (again.folder, again.manifest) == (folder, bundle.manifest)


def test_the_card_says_what_it_is(hub, bundle):
    push(bundle, parse_name(NAME), FREE)
    card = hub.files(NAME)["README.md"].decode()
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card
    assert "| 0.5 | 8 of 16 | all |" in card
    assert "Not compared when it was pushed" in card
    assert "Not measured" in card
    push(bundle, parse_name(NAME), License(name=UNKNOWN, said_by="x"))
    card = hub.files(NAME)["README.md"].decode()
    assert "| licence of that | **unknown** |" in card
    assert "license:" not in card


def test_a_second_push_sends_nothing_twice_and_removes_what_is_gone(hub, bundle, make_bundle):
    push(bundle, parse_name(NAME), FREE)
    hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]["NOTICE"] = b"mine"
    bundle.folder.rename(bundle.folder.with_name("first"))
    other = Bundle.open(make_bundle(more={"other.bin": LARGE}))
    push(other, parse_name(NAME), FREE)
    assert hub.count("PUT", "/lfs/") == 1
    assert set(hub.files(NAME)) == {*other.manifest.files, "manifest.json", "README.md", "NOTICE"}


def test_a_branch_is_made(hub, bundle):
    push(bundle, parse_name(f"{NAME}@half"), FREE)
    assert hub.files(NAME) == {}
    assert Bundle.open(f"hub:{NAME}@half").manifest == bundle.manifest


def test_a_repository_with_something_else_is_left_alone(hub, bundle):
    hub.repositories[NAME] = hub_maker.Repository()
    hub.repositories[NAME].commit("main", {"model.safetensors": b"x"})
    with pytest.raises(ConfigError, match=r"holds no bundle but model.safetensors; push to"):
        push(bundle, parse_name(NAME), FREE)
    with pytest.raises(HubError, match=r"no manifest.json, so it is no bundle"):
        Bundle.open(f"hub:{NAME}")


def test_a_pull_that_broke_off_goes_on(hub, bundle, tmp_path):
    push(bundle, parse_name(NAME), FREE)
    here = tmp_path / "here"
    hub.cut = len(LARGE) // 20
    with pytest.raises(HubError, match="cannot be pulled"):
        pull(parse_name(NAME), here)
    assert not (here / "extra.bin").exists()
    hub.cut = None
    assert pull(parse_name(NAME), here) == here
    assert (here / "extra.bin").read_bytes() == LARGE


@pytest.mark.usefixtures("hub")
def test_a_full_disk_is_told_and_the_next_pull_goes_on(bundle, tmp_path):
    resource = pytest.importorskip("resource")
    push(bundle, parse_name(NAME), FREE)
    here, most = tmp_path / "here", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * hub_maker.SMALL, most[1]))
    try:
        with pytest.raises(HubError, match="cannot be pulled: File too large; what has come lies"):
            pull(parse_name(NAME), here)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    with pytest.raises(BundleError):
        Bundle.open(here).verify(limit=None)
    assert pull(parse_name(NAME), here) == here
    names = [*bundle.manifest.files, "manifest.json"]
    assert contents(here, names) == contents(bundle.folder, names)


@pytest.mark.usefixtures("hub")
def test_a_place_that_cannot_be_written_is_told(bundle, tmp_path, monkeypatch):
    push(bundle, parse_name(NAME), FREE)
    pull(parse_name(NAME))
    for number in (errno.EROFS, errno.EIO):
        monkeypatch.setattr(os, "makedirs", fail_with(number))
        monkeypatch.setattr("pathlib.Path.mkdir", fail_with(number))
        with pytest.raises(HubError, match="cannot be pulled: ") as caught:
            pull(parse_name(NAME), tmp_path / "there")
        assert os.strerror(number) in str(caught.value)
        assert not (tmp_path / "there").exists()


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_what_came_wrong_is_removed_and_said(hub, bundle):
    push(bundle, parse_name(NAME), FREE)
    oid = next(iter(hub.objects))
    right, hub.objects[oid] = hub.objects[oid], bytes(len(LARGE))
    with pytest.raises(HubError, match=r"extra.bin: the BLAKE3 differs.*Pull again"):
        Bundle.open(f"hub:{NAME}")
    hub.objects[oid] = right
    assert Bundle.open(f"hub:{NAME}").manifest == bundle.manifest


@pytest.mark.usefixtures("hub")
def test_without_a_network_the_cache_is_taken(bundle, monkeypatch):
    push(bundle, parse_name(NAME), FREE)
    folder = Bundle.open(f"hub:{NAME}").folder
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert Bundle.open(f"hub:{NAME}").folder == folder
    with pytest.raises(HubError, match=r"hub:org/other: cannot be pulled: no network"):
        Bundle.open("hub:org/other")
    with pytest.raises(HubError, match="cannot be pushed"):
        push(bundle, parse_name(NAME), FREE)


@pytest.mark.usefixtures("hub")
def test_errors_are_one_line(bundle, monkeypatch, tmp_path):
    push(bundle, parse_name(NAME), FREE)
    with pytest.raises(HubError, match=r"org/none: cannot be pulled: no such repository"):
        Bundle.open("hub:org/none")
    with pytest.raises(HubError, match=r"org/tiny@gone: cannot be pulled: no such branch"):
        Bundle.open(f"hub:{NAME}@gone")
    for wrong in ("tiny", "a/b/c", "org/tiny@", "org/ti ny"):
        with pytest.raises(ConfigError):
            parse_name(wrong)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(ConfigError, match="holds something else"):
        pull(parse_name(NAME), full)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="the token is not valid"):
        require_login(parse_name(NAME))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no token for the hub; run `hf auth login`"):
        require_login(parse_name(NAME))


def test_a_file_that_changed_is_not_pushed(hub, bundle):
    (bundle.folder / "extra.bin").write_bytes(LARGE[::-1])
    with pytest.raises(BundleError, match=r"extra.bin: BLAKE3"):
        push(bundle, parse_name(NAME), FREE)
    assert NAME not in hub.repositories


def ask_source(checkpoint):
    return Source(checkpoint=checkpoint, revision=None, index_sha256="0" * 64)


def test_licences_of_the_source(hub, tmp_path):
    hub.repositories["org/model"] = hub_maker.Repository()
    for card, word, is_bound in [
        ({}, UNKNOWN, False),
        ({"cardData": {"license": "apache-2.0"}}, "apache-2.0", False),
        ({"cardData": {"license": "llama2"}}, "llama2", True),
        ({"cardData": {"license": "other", "license_name": "Research"}}, "research", True),
        ({"cardData": {"license": "cc-by-nc-nd-4.0"}}, "cc-by-nc-nd-4.0", True),
        ({"cardData": {"license": "mit"}, "gated": "manual"}, "mit", True),
    ]:
        hub.cards["org/model"] = card
        found = find_license(ask_source("org/model"))
        assert (found.name, found.find_obstacle() is not None) == (word, is_bound)
    (tmp_path / "README.md").write_text("---\nlicense: llama3\n---\n")
    found = find_license(ask_source(str(tmp_path)))
    assert found.name == "llama3"
    with pytest.raises(ConfigError, match=r"llama3 .* --accept-license"):
        found.require_shareable(accepted=False)
    found.require_shareable(accepted=True)
    assert find_license(ask_source("org/none")).name == UNKNOWN
    assert find_license(ask_source("mine")).describe().startswith("the licence of the source mod")
    assert find_license(ask_source("mine"), "MIT").name == "mit"


@pytest.mark.parametrize(
    "card",
    [
        *(
            "---\na: [\n---\n",
            "---\n\ta: b: c\n---\n",
            "---\na: !!python/object:os.system x\n---\n",
        ),
        *("---\n? [a]\n: b\n---\n", "---\n1: 2\n---\n", "---\nself: 2\n---\n", "---\n- a\n---\n"),
        *("---\nlicense: [mit]\n---\n", "---\na: " + "[" * 3000 + "\n---\n", "\0"),
    ],
)
def test_a_card_that_is_none_names_no_licence(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert find_license(ask_source(str(tmp_path))).name == UNKNOWN


@pytest.mark.parametrize(
    "reply",
    [{"siblings": 7}, {"siblings": [{"x": 1}]}, {"siblings": [None]}, {"sha": 7}, {"id": None}],
)
def test_what_answers_as_no_hub_does_is_told(hub, bundle, reply):
    push(bundle, parse_name(NAME), FREE)
    hub.cards[NAME] = reply
    with contextlib.suppress(HubError):
        folder = pull(parse_name(NAME))
        # What is not needed of a reply may be anything.
        assert Bundle.open(folder, verify_all=True).manifest == bundle.manifest


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "said"),
    [
        (["pull", "org"], {}, 2, "error: 'org': expected org/name or org/name@revision\n"),
        (["pull", "a/b"], {}, 4, "error: hub:a/b: cannot be pulled: no network to the hub ("),
        (
            ["push", "{bundle}", "a/b"],
            {},
            4,
            "error: hub:a/b: cannot be pushed: no network to the hub (",
        ),
        (["pull", "a/b"], {"HF_ENDPOINT": "\x1b"}, 4, "error: hub:a/b: cannot be pulled: "),
        (
            ["push", "{bundle}", "a/b"],
            {"HF_ENDPOINT": "http://127.0.0.1:99999"},
            4,
            "error: hub:a/b: cannot be pushed: Port out of range",
        ),
        (["pull", "a/b"], {"ALL_PROXY": "socks5://a:1"}, 4, "error: hub:a/b: cannot be pulled: "),
        (
            ["pull", "a/b"],
            {"HF_HUB_DOWNLOAD_TIMEOUT": "soon"},
            2,
            "error: huggingface_hub cannot read the variables HF_... of the environment (",
        ),
    ],
)
def test_commands_in_a_process_of_their_own(bundle, arguments, variables, code, said):
    """Nothing but the command has loaded the library, which loads its parts one by one."""
    text = "import sys; from gap_runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", text, *(each.format(bundle=bundle.folder) for each in arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_TOKEN": "hf_x", **variables},
    )
    lines = [line for line in done.stderr.splitlines(keepends=True) if line.startswith("error")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("hub")
def test_the_commands(bundle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "weights"
    os.link(bundle.folder / "extra.bin", link)
    assert cli.main(["push", str(bundle.folder), NAME, "--license", "llama2", "--json"]) == 2
    assert "--accept-license" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert cli.main(["push", str(bundle.folder), NAME, "--json", "--private"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["license"] == UNKNOWN
    assert "extra.bin: hard links; their content is pushed" in err
    assert "is unknown; find out" in err
    assert cli.main(["pull", NAME, "--out", "there", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["bundle"], got["files"]) == (str(tmp_path / "there"), len(bundle.manifest.files))
    assert cli.main(["info", f"hub:{NAME}"]) == 0
    assert "tiny-8of16" in capsys.readouterr().out
