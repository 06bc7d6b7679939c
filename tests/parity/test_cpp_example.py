"""The C++ example finds the boxes that the Python runtime finds.

It is built where there are a compiler and the headers: onnxruntime's C++ interface (the folder of
a release in ONNXRUNTIME_ROOT, or where a system has them), stb and nlohmann-json.
"""

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tools.places import ROOT

from gap_runtime import Bundle, Grounder

SOURCE = ROOT / "examples" / "cpp"
SAMPLES = ROOT / "refshapes" / "samples"
PLACES = [
    Path(os.environ.get("ONNXRUNTIME_ROOT", "/nowhere"), "include"),
    *(Path(each, "include", "onnxruntime") for each in ("/usr", "/usr/local")),
]


def find_headers(name, places):
    return next((place for place in places if (place / name).is_file()), None)


def find_library():
    """The shared library that onnxruntime's wheel holds."""
    spec = find_spec("onnxruntime")
    folder = Path(spec.origin).parent / "capi"
    return next(folder.glob("libonnxruntime.so.*"), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The built example."""
    compiler = shutil.which("c++") or shutil.which("g++")
    onnxruntime = find_headers("onnxruntime_cxx_api.h", PLACES)
    stb = find_headers("stb_image.h", [Path("/usr/include/stb"), Path("/usr/include")])
    json_headers = find_headers("nlohmann/json.hpp", [Path("/usr/include")])
    library = find_library()
    needed = {
        "a C++ compiler": compiler,
        "onnxruntime's C++ headers (ONNXRUNTIME_ROOT)": onnxruntime,
        "stb (libstb-dev)": stb,
        "nlohmann-json (nlohmann-json3-dev)": json_headers,
        "a wheel of onnxruntime with its shared library": library,
    }
    missing = [name for name, found in needed.items() if found is None]
    if missing:
        pytest.skip(f"the C++ example is not built here, there is no {', no '.join(missing)}")
    home = tmp_path_factory.mktemp("cpp")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (home / name).symlink_to(library)
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"),
            *(f"-isystem{onnxruntime}", f"-isystem{stb}", SOURCE / "ground.cpp"),
            *("-o", home / "ground", f"-L{home}", "-lonnxruntime", f"-Wl,-rpath,{home}"),
        ],
        check=True,
    )
    return home / "ground"


def ground(program, *words):
    return subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Samples and their phrases as they are, and made wide, high, large and grey."""
    home = tmp_path_factory.mktemp("pictures")
    samples = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    asked = [(SAMPLES / each["image"], each["phrase"]) for each in samples]
    for (path, phrase), size in zip(asked[:3], [(400, 90), (61, 200), (333, 334)], strict=True):
        with Image.open(path) as picture:
            picture.resize(size).save(home / path.name)
        asked.append((home / path.name, phrase))
    noise = np.random.default_rng(0).integers(0, 256, (150, 97), np.uint8)
    Image.fromarray(noise).save(home / "grey.png")
    return [*asked, (home / "grey.png", "the red   square")]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_boxes_are_those_of_the_runtime(program, pictures, refshapes_bundle, ratio):
    with Grounder(Bundle.open(refshapes_bundle), ratio=ratio) as grounder:
        for path, phrase in pictures:
            found = grounder.ground(path, phrase)
            done = ground(program, refshapes_bundle, path, phrase, ratio)
            assert done.returncode == 0, done.stderr
            lines = [" ".join(f"{value:.1f}" for value in box) for box in found.boxes]
            assert done.stdout.splitlines() == lines
            assert done.stderr.startswith(f"{found.answer}  kept {found.kept} of")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["nowhere", SAMPLES / "test-006.png", "it"], "no manifest.json"),
        (["BUNDLE", "nowhere.png", "it"], "nowhere.png: "),
        (["BUNDLE", SAMPLES / "test-006.png", " "], "the phrase is empty"),
        (["BUNDLE", SAMPLES / "test-006.png", "a <image>"], "special token"),
        (["BUNDLE", SAMPLES / "test-006.png", "it", "0.3"], "no ratio 0.3"),
        (["BUNDLE", SAMPLES / "test-006.png", "word " * 90], "does not fit"),
    ],
)
def test_what_cannot_be_used_is_said(program, refshapes_bundle, change, said):
    words = [refshapes_bundle if word == "BUNDLE" else word for word in change]
    done = ground(program, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_page_says_how_it_is_built():
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    assert "cmake -S examples/cpp -B build/cpp" in text
    assert "examples/cpp" in text
