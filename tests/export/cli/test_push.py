"""`gap-export --push`: refused before the work where it must be; the card has the check."""

import json

import pytest
from huggingface_hub import constants
from makers.hub import TOKEN, Hub

from gap_export.checkpoint.index import open_checkpoint
from gap_export.config.load import load_config
from gap_export.pipeline import api
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.license import find_license
from gap_runtime.bundle.manifest import Source
from gap_runtime.cli import main as runtime
from gap_runtime.errors import ConfigError
from gap_runtime.report.card import read_accuracy


@pytest.fixture
def hub(monkeypatch, tmp_path):
    found = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    found.close()


@pytest.mark.usefixtures("graphs_traced_once")
def test_an_export_is_pushed_with_its_check(hub, run, tmp_path, capsys):
    code, out, _ = run(
        *("refshapes", "--ratio", "0.5", "--out", tmp_path / "b"), "--push", "org/b", "--json"
    )
    assert code == 0
    assert json.loads(out)["pushed"]["license"] == "apache-2.0"
    card = hub.files("org/b")["README.md"].decode()
    assert "| 0.5 | 3 of 3 | 3 of 3 | " in card
    assert "| positions | gap |" in card
    bundle = Bundle.open("hub:org/b")
    assert bundle.manifest == Bundle.open(tmp_path / "b").manifest
    measured = tmp_path / "accuracy.json"
    assert (
        runtime.main(
            ["evaluate", "hub:org/b", "--data", "refshapes:test", "--limit", "2", "--json"]
        )
        == 0
    )
    measured.write_text(capsys.readouterr().out)
    assert read_accuracy(measured, bundle)["scores"][0]["phrases"] == 2
    measured.write_text(measured.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(ConfigError, match="measured with another bundle"):
        read_accuracy(measured, bundle)
    measured.write_text("[]")
    with pytest.raises(ConfigError, match="not what gap-runtime evaluate --json prints"):
        read_accuracy(measured, bundle)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push", "b"], "expected org/name"),
        (["--push", "b", "--dry-run"], "'b': expected org/name"),
        (["--push", "a b/c", "--dry-run"], "error: 'a b/c': "),
        (["--push", "", "--dry-run"], "error: '': "),
        (["--push", "org/b", "--license", "llama2"], "--accept-license"),
    ],
)
def test_what_is_refused_is_refused_before_the_work(run, monkeypatch, flags, words):
    monkeypatch.setattr(api, "export_request", None)
    code, out, err = run("refshapes", *flags)
    assert (code, out) == (2, "")
    assert words in err


def test_the_embedded_models_are_known():
    for name in ("refshapes", "refshapes-256"):
        config = load_config(name, {}).config
        found = open_checkpoint(config.checkpoint)
        source = Source(checkpoint=name, revision=None, index_sha256=found.index_sha256)
        assert find_license(source).name == "apache-2.0"
