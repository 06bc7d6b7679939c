"""onnxruntime-gpu's real CUDA provider on a machine without a GPU.

The provider is linked with CUDA's libraries. Here they are made anew with the C compiler: the CUDA
runtime in fake_cudart.c, whose device is host memory; cuBLAS and the rest of functions that do
nothing. What the provider decides is real: where nodes, inputs and caches go, what is copied and
waited for, which kernels are launched, whether a graph can be recorded. What kernels compute is
not there.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.wheels import unpack

ONNXRUNTIME = "onnxruntime-gpu==1.31.1"
_HEADERS = "nvidia-cuda-runtime"
_SOURCE = Path(__file__).with_name("fake_cudart.c")
_DRIVER = "int cuInit(unsigned flags) { return 0; }\n"
_NVCC_HEADER = """#pragma once
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __forceinline__ inline
#define __location__(a)
#define __specialization_static static
#define CUDARTAPI
#define CUDARTAPI_CDECL
"""
"""Stands for a header of nvcc's own: words that a C compiler must not see."""
_NVCC_WORDS = (
    *("device_builtin", "cudart_builtin", "device_builtin_texture_type"),
    *("device_builtin_surface_type", "host", "device", "no_return", "inline_hint"),
)
_LIBRARIES = {"cudart": 13, "cublas": 13, "cublasLt": 13, "curand": 10, "cuda": 1}
_HANDLES = r"cublas(?:Lt)?(?:Create(?:_v2)?|\w+Create)"


def prepare():
    """Folders of onnxruntime-gpu and of the libraries that it starts on; made once.

    Returns:
        What goes into PYTHONPATH and into LD_LIBRARY_PATH.
    """
    if not (shutil.which("gcc") and shutil.which("readelf")):
        pytest.skip("no gcc and readelf, which make CUDA's libraries anew")
    site = unpack(ONNXRUNTIME)
    place = site / "fake-cuda"
    if not place.is_dir() or place.stat().st_mtime < _SOURCE.stat().st_mtime:
        _build(site, place)
    return site, place


def _build(site, place):
    shutil.rmtree(place, ignore_errors=True)
    aside = place.with_name("fake-cuda.partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "crt").mkdir(parents=True)
    words = "".join(f"#define __{word}__\n" for word in _NVCC_WORDS)
    (aside / "crt" / "host_defines.h").write_text(_NVCC_HEADER + words)
    headers = next(unpack(_HEADERS).rglob("driver_types.h")).parent
    provider = site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    listed = _ask("readelf", "--dyn-syms", "--wide", provider)
    for name, major in _LIBRARIES.items():
        wanted = set(re.findall(rf"UND (\w+)@lib{name}\.so\.{major}\b", listed))
        if name == "cuda":
            # The driver's functions are of no version.
            wanted |= set(re.findall(r"UND (cu[A-Z]\w+)$", listed, re.MULTILINE))
        source = _SOURCE.read_text(encoding="utf-8") if name == "cudart" else ""
        source += _DRIVER if name == "cuda" else ""
        missing = sorted(each for each in wanted if not re.search(rf"\b{each}\(", source))
        source += "".join(map(_stand_in, missing))
        (aside / f"{name}.c").write_text(source)
        soname = f"lib{name}.so.{major}"
        (aside / f"{name}.map").write_text(f"{soname} {{ global: *; }};\n")
        command = ["gcc", "-w", "-O1", "-shared", "-fPIC", f"-I{aside}", f"-I{headers}"]
        command += [f"-Wl,-soname,{soname}", f"-Wl,--version-script={aside / f'{name}.map'}"]
        _ask(*command, "-o", aside / soname, aside / f"{name}.c", "-ldl", "-lpthread")
    aside.rename(place)


def _stand_in(name):
    """A function that succeeds and does nothing but what its caller cannot do without."""
    if re.fullmatch(_HANDLES, name):
        return f"int {name}(void **handle) {{ *handle = (void *)0x1234; return 0; }}\n"
    if name == "cublasLtMatmulAlgoGetHeuristic":
        ten = "void *a, void *b, void *c, void *d, void *e, void *f, void *g, int h"
        # One algorithm was found, and it needs no memory.
        return (
            f"int {name}({ten}, void *found, int *count) "
            "{ for (int i = 0; i < 96; i++) ((char *)found)[i] = 0; *count = 1; return 0; }\n"
        )
    if "GetStatus" in name:
        return f'const char *{name}(int status) {{ return "ok"; }}\n'
    if name == "cublasGetMathMode":
        return f"int {name}(void *handle, int *mode) {{ *mode = 0; return 0; }}\n"
    return f"int {name}(void) {{ return 0; }}\n"


def _ask(*command):
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
