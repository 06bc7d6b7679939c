"""What the real bindings of TensorRT and CUDA offer, read without their libraries and a GPU.

TensorRT's are an extension module that wants `libnvinfer` and others by name. Libraries of those
names that hold nothing but functions that give null are made with the C compiler.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

_READ = """
import importlib.machinery, importlib.util, json, sys
kind, path = sys.argv[1:]
if kind == "cuda":
    from cuda.bindings import runtime as module
else:
    loader = importlib.machinery.ExtensionFileLoader(kind, path)
    spec = importlib.util.spec_from_file_location(kind, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[kind] = module
    loader.exec_module(module)
def describe(value):
    return (value.__doc__ or "") if callable(value) else "value"
found = {"": {name: describe(getattr(module, name)) for name in dir(module)}}
for name in dir(module):
    value = getattr(module, name)
    if isinstance(value, type):
        found[name] = {each: describe(getattr(value, each, None)) for each in dir(value)}
starts = {}
if kind != "cuda":
    class Log(module.ILogger):
        def __init__(self):
            module.ILogger.__init__(self)
        def log(self, severity, text):
            pass
    for name in ("Builder", "Runtime"):
        try:
            getattr(module, name)(Log())
            starts[name] = ""
        except Exception as error:
            starts[name] = type(error).__name__
print(json.dumps({"classes": found, "starts": starts}))
"""


class Surface:
    """Classes of a module, each with its attributes and what their docstrings say."""

    def __init__(self, classes, starts):
        self.classes, self.starts = classes, starts

    def has(self, owner, name):
        return name in self.classes.get(owner, {})

    def signatures(self, owner, name):
        """The parameters of each form of a function, (names, how many have a default)."""
        text = self.classes[owner][name]
        found = re.findall(rf"^(?:\d+\. )?{name}\((.*?)\)(?: ->.*)?$", text, re.MULTILINE)
        return [_read_parameters(each) for each in found]

    def takes(self, owner, name, count, keywords):
        """Whether some form of a function takes so many arguments and these keywords."""
        return any(
            set(keywords) <= set(names)
            and len(names) - defaults <= count + len(keywords) <= len(names)
            for names, defaults in self.signatures(owner, name)
        )


def _read_parameters(text):
    """Names of parameters but `self`, from a signature; commas inside brackets part nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts if part.strip() not in ("", "*", "/")]
    # cuda-python writes C's types before names, pybind11 Python's behind them.
    names = [re.split(r"[:=]", part)[0].split()[-1].strip("* ") for part in parts]
    pairs = [(n, "=" in part) for n, part in zip(names, parts, strict=True) if n != "self"]
    return [name for name, _ in pairs], sum(has for _, has in pairs)


def read_module(module):
    """The surface of a module that is installed here."""

    def read(owner):
        values = {name: getattr(owner, name, None) for name in dir(owner)}
        return {k: (v.__doc__ or "") if callable(v) else "value" for k, v in values.items()}

    classes = {name: read(v) for name, v in vars(module).items() if isinstance(v, type)}
    return Surface({"": read(module), **classes}, {})


def read_tensorrt(folder):
    """The surface of TensorRT's bindings that lie unpacked in a folder."""
    (path,) = folder.glob("*/tensorrt.so")
    return _read("tensorrt", path, {"LD_LIBRARY_PATH": str(_make_libraries(folder, path))})


def read_cuda(folder):
    """The surface of cuda-python that lies unpacked in a folder."""
    return _read("cuda", folder, {"PYTHONPATH": str(folder)})


def _read(kind, path, variables):
    done = subprocess.run(
        [sys.executable, "-c", _READ, kind, str(path)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Surface(**json.loads(done.stdout))


def _make_libraries(folder, module):
    """A folder with libraries that the bindings start on."""
    if not (shutil.which("gcc") and shutil.which("readelf")):
        pytest.skip(
            "gcc and readelf, which make libraries for the bindings to start on, are not here"
        )
    place = folder / "empty-libraries"
    if place.is_dir():
        return place
    needed = _ask("readelf", "-d", module)
    names = re.findall(r"NEEDED.*\[(libnv[^\]]*)\]", needed)
    symbols = _ask("readelf", "--dyn-syms", "--wide", module)
    wanted = re.findall(
        r"UND ((?:create|get|init)\w*(?:_INTERNAL|Plugin\w*|Parser\w*)\b)", symbols
    )
    source = "".join(f"void *{each}(void) {{ return 0; }}\n" for each in sorted(set(wanted)))
    aside = place.with_name("empty-libraries.partial")
    aside.mkdir(exist_ok=True)
    (aside / "empty.c").write_text(source)
    for name in names:
        soname = f"-Wl,-soname,{name}"
        _ask("gcc", "-w", "-shared", "-fPIC", soname, "-o", aside / name, aside / "empty.c")
    aside.rename(place)
    return place


def _ask(*command):
    return subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=True, timeout=60
    ).stdout
