"""When, where and with what a report says that it was made."""

import datetime as dt
import hashlib
from dataclasses import replace

from gap_runtime import __version__
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.machines.survey import Gpu, Jetson, survey_machine
from gap_runtime.report.occasion import describe_occasion, note_occasion

UTC = dt.timezone.utc  # noqa: UP017 - the runtime is tested on Python 3.10 too
WHEN = dt.datetime(2026, 3, 4, 15, 6, tzinfo=UTC)


def test_a_workstation_with_a_gpu(make_bundle, tmp_path):
    bundle = Bundle.open(make_bundle())
    machine = replace(
        survey_machine(tmp_path),
        system="Linux x86_64",
        python="3.12.3",
        gpus=(Gpu(name="L4", compute_capability="8.9", memory_mib=23034, free_mib=None),),
        driver="580.95",
        cuda="13.0",
        jetson=None,
        onnxruntimes={"onnxruntime-gpu": "1.31.1"},
        engines={"tensorrt": "10.16.0"},
    )
    exported = ", ".join(f"{name} {of}" for name, of in bundle.manifest.versions.items())
    digest = hashlib.sha256((bundle.folder / "manifest.json").read_bytes()).hexdigest()
    here = f"gap-runtime {__version__}, Python 3.12.3, onnxruntime-gpu 1.31.1, tensorrt 10.16.0"
    assert describe_occasion(bundle, machine, "shelf", WHEN) == (
        ("date", "2026-03-04 15:06 UTC"),
        ("host", "shelf"),
        ("system", "Linux x86_64"),
        ("GPU", "L4, compute capability 8.9, 22.5 GiB; driver 580.95, CUDA 13.0"),
        ("versions", here),
        ("exported with", exported),
        ("bundle", f"{bundle.folder.name}, manifest {digest} (SHA-256)"),
    )


def test_a_jetson_by_its_name_and_a_machine_without_a_gpu(make_bundle, tmp_path):
    bundle = Bundle.open(make_bundle())
    jetson = Jetson(model="NVIDIA Jetson Orin Nano", linux="36.4.7", jetpack="6.2.1")
    machine = replace(survey_machine(tmp_path), gpus=(), jetson=jetson)
    told = dict(describe_occasion(bundle, machine, "", WHEN))
    assert (told["host"], told["system"]) == ("unknown", "NVIDIA Jetson Orin Nano")
    assert told["GPU"] == "none found"


def test_now_is_now(make_bundle):
    before = dt.datetime.now(UTC).replace(second=0, microsecond=0, tzinfo=None)
    told = dict(note_occasion(Bundle.open(make_bundle())))
    assert before <= dt.datetime.strptime(told["date"], "%Y-%m-%d %H:%M UTC")  # noqa: DTZ007
