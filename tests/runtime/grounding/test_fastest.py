"""Which backend `auto` is: what was measured on this machine, for this bundle."""

import dataclasses
import json

import pytest

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.files import user_cache
from gap_runtime.cli.main import main
from gap_runtime.errors import ConfigError, EngineError
from gap_runtime.grounding.fastest import choose_backend, time_backends

TIMES = {"onnxruntime": 30.0, "openvino": 20.0}


@pytest.fixture
def bundle(make_bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return Bundle.open(make_bundle())


def measure(name):
    if name not in TIMES:
        raise EngineError(f"{name} is not installed")
    return TIMES[name]


def test_the_fastest_is_remembered(bundle):
    assert choose_backend(bundle, "auto") == "onnxruntime"
    timed = time_backends(bundle, measure)
    assert [each.backend for each in timed[:2]] == ["openvino", "onnxruntime"]
    assert [(each.backend, each.problem) for each in timed[2:]] == [
        ("tensorrt", "tensorrt is not installed")
    ]
    assert choose_backend(bundle, "auto") == "openvino"
    assert choose_backend(bundle, "tensorrt:here") == "tensorrt:here"


def test_another_bundle_is_another_question(bundle):
    time_backends(bundle, measure)
    files = dict(bundle.manifest.files)
    name = next(iter(files))
    files[name] = dataclasses.replace(files[name], blake3="0" * 64)
    manifest = dataclasses.replace(bundle.manifest, files=files)
    changed = dataclasses.replace(bundle, manifest=manifest)
    assert choose_backend(changed, "auto") == "onnxruntime"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"backend": "another"}'])
def test_what_cannot_be_read_is_nothing(bundle, text):
    time_backends(bundle, measure)
    (path,) = user_cache().rglob("fastest-*.json")
    path.write_text(text, encoding="utf-8")
    assert choose_backend(bundle, "auto") == "onnxruntime"


def test_a_machine_without_any_is_told_why(bundle):
    def fail(name):
        raise ConfigError(f"{name}: no")

    with pytest.raises(EngineError, match="no backend runs it; first: onnxruntime: no"):
        time_backends(bundle, fail)
    assert choose_backend(bundle, "auto") == "onnxruntime"


def test_on_the_command_line(bundle, monkeypatch, capsys):
    from gap_runtime.grounding import bench

    rows = SimpleRows()
    monkeypatch.setattr(bench, "bench_bundle", rows.give)
    assert main(["bench", str(bundle.folder), "--all", "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    # 1 + 2 + 3 and 15 further tokens, at two ratios.
    assert [(each["backend"], each["milliseconds"]) for each in timed[:2]] == [
        ("openvino", 2 * (6 + 15 * 0.5)),
        ("onnxruntime", 2 * (6 + 15 * 1.0)),
    ]
    assert "not installed" in timed[2]["problem"]
    assert choose_backend(bundle, "auto") == "openvino"
    assert main(["bench", str(bundle.folder), "--all"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "openvino: 27.0 ms"
    assert "--backend auto takes openvino" in said.err


class SimpleRows:
    """Reports of two ratios; OpenVINO's tokens take half as long."""

    def give(self, bundle, backend, *, runs, ratios, begin):
        from gap_runtime.grounding.bench import BenchReport, BenchRow

        assert (runs, len(ratios)) == (7, 2)
        with begin(1) as note:
            note(1)
        if backend not in TIMES:
            raise EngineError(f"{backend} is not installed")
        token = 0.5 if backend == "openvino" else 1.0
        rows = [
            BenchRow(
                ratio=ratio,
                bucket="",
                kept=1,
                patches=2,
                prompt=3,
                preprocess_ms=1.0,
                vision_ms=2.0,
                prefill_ms=3.0,
                further_ms=1.0,
                token_ms=token,
                tokens_per_second=1e3 / token,
                answer_ms=1.0,
                tokens=1,
                calls=1,
                drafted=0,
                accepted=0,
                request_p50_ms=9.0,
                request_p95_ms=9.0,
            )
            for ratio in ratios
        ]
        return BenchReport(
            warmup=2,
            peak_memory_mib=None,
            device_memory=(),
            power=(),
            bundle=str(bundle.folder),
            backend=backend,
            runs=runs,
            cores=1,
            load_average=None,
            rows=tuple(rows),
        )
