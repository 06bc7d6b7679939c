"""What the backends call of TensorRT and CUDA is there, in the bindings of every version.

The code is read, not run: every attribute of an object of these libraries, and every call with
the number of its arguments and its keywords, is looked up in the real bindings.
"""

import ast
import functools
from pathlib import Path

import pytest
from tools.bindings import read_cuda, read_module, read_tensorrt
from tools.wheels import unpack

from gap_runtime.backends import tensorrt as backend

_FOLDER = Path(backend.__file__).parent
_TENSORRT = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.16": "tensorrt-cu13-bindings==10.16.*",
    "11.4": "tensorrt-cu13-bindings==11.4.*",
}
_CUDA = {
    "12.6": ("cuda-python==12.6.*",),
    "13.2": ("cuda-bindings==13.2.*", "cuda-pathfinder"),
    "13.4": ("cuda-bindings==13.4.*", "cuda-pathfinder"),
}
_CUDA_VALUES = {
    "cudaDeviceAttr": (
        "DevAttrIntegrated",
        "DevAttrComputeCapabilityMajor",
        "DevAttrComputeCapabilityMinor",
    ),
    "cudaMemcpyKind": ("MemcpyHostToDevice", "MemcpyDeviceToHost", "MemcpyDeviceToDevice"),
    "cudaStreamCaptureMode": ("StreamCaptureModeThreadLocal",),
}
_FILES = ("builder.py", "library.py", "session.py", "kernels.py", "slots.py")
_SINCE_11 = "slots.py"
"""Used only where the library has attention with lengths."""
_OWNERS = {
    "trt": "",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "settings": "IRuntimeConfig",
    "attention": "IAttention",
    "masked": "IAttention",
    "layer": "IAttentionOutputLayer",
    "IAttentionOutputLayer": "IAttentionOutputLayer",
    "CausalMaskKind": "CausalMaskKind",
    "ElementWiseOperation": "ElementWiseOperation",
    "LayerType": "LayerType",
    "ILogger": "ILogger",
    "IProgressMonitor": "IProgressMonitor",
    "BuilderFlag": "BuilderFlag",
    "MemoryPoolType": "MemoryPoolType",
    "ComputeCapability": "ComputeCapability",
    "NetworkDefinitionCreationFlag": "NetworkDefinitionCreationFlag",
    "ExecutionContextAllocationStrategy": "ExecutionContextAllocationStrategy",
    "DynamicShapesKernelSpecializationStrategy": "DynamicShapesKernelSpecializationStrategy",
}
"""The class of what a name in our code holds; the module's own things are under ''."""
_RTX_ALONE = {
    ("", "ComputeCapability"),
    ("", "DynamicShapesKernelSpecializationStrategy"),
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
}
"""What the code takes of TensorRT-RTX only, besides all of kernels.py."""
_GUARDED = {
    ("ICudaEngine", "device_memory_size"): "asked for where its successor is missing",
    ("Builder", "build_serialized_network_to_stream"): "asked for before it is used",
    ("", "IStreamWriter"): "there with the call that takes it",
}
"""What some versions lack, and why that is no matter."""


_ELSEWHERE = {("session.py", "tensor"): "", ("kernels.py", "_cache"): "IRuntimeCache"}
"""What names hold in one file alone; nothing of the library's under ''."""
_OF_EXCEPTIONS = {("ParserError", "name"), ("ParserError", "strerror")}
"""Of Python's own errors, which the code calls `error` as well."""


def _final(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "").strip("_")


@functools.cache
def list_uses():
    """(file, class, attribute, arguments, keywords) of all that is used; no call: None, ()."""
    uses = set()
    for file in _FILES:
        tree = ast.parse((_FOLDER / file).read_text(encoding="utf-8"))
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                continue
            held = _final(node.value)
            owner, call = _ELSEWHERE.get((file, held), _OWNERS.get(held)), calls.get(id(node))
            # The module's own things have no class, and are held by `trt` alone.
            if owner is None or (not owner and held != "trt"):
                continue
            if (owner, node.attr) in _OF_EXCEPTIONS:
                continue
            if call is None:
                uses.add((file, owner, node.attr, None, ()))
            else:
                keywords = tuple(each.arg for each in call.keywords)
                uses.add((file, owner, node.attr, len(call.args), keywords))
    return uses


def test_the_reading_finds_what_is_used():
    found = {(owner, name) for _, owner, name, _, _ in list_uses()}
    assert {
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "set_timing_cache"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "create_execution_context"),
        ("IRuntimeConfig", "set_runtime_cache"),
        ("OnnxParser", "parse_from_file"),
        ("ParserError", "node_operator"),
        ("BuilderFlag", "TF32"),
        ("", "Runtime"),
    } <= found
    assert len(found) > 40


def require(surface, *, is_rtx):
    """Assert that all that the code uses is there, with these arguments."""
    lost = []
    has_lengths = surface.has("IAttention", "key_value_lengths")
    for file, owner, name, count, keywords in sorted(list_uses(), key=str):
        if file == _SINCE_11 and not has_lengths:
            continue
        if not is_rtx and (file == "kernels.py" or (owner, name) in _RTX_ALONE):
            continue
        if not surface.has(owner, name):
            if (owner, name) not in _GUARDED:
                lost.append(f"{file}: {owner}.{name} is not there")
            continue
        is_class = not owner and name in surface.classes
        if count is not None and not is_class and not surface.takes(owner, name, count, keywords):
            found = surface.signatures(owner, name)
            lost.append(f"{file}: {owner}.{name} with {count} and {keywords}, it takes {found}")
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("version", _TENSORRT)
def test_tensorrt(version):
    surface = read_tensorrt(unpack(_TENSORRT[version]))
    require(surface, is_rtx=False)
    assert surface.has("IAttention", "key_value_lengths") == (version == "11.4")
    # What comes of a library that gives null: library._start catches it.
    assert surface.starts == {"Builder": "TypeError", "Runtime": "TypeError"}


def test_tensorrt_rtx():
    """The installed one, whose builder the other tests run."""
    require(read_module(pytest.importorskip("tensorrt_rtx")), is_rtx=True)


@functools.cache
def list_cuda_uses():
    """Functions of CUDA that _cuda.py calls, each with the number of its arguments."""
    tree = ast.parse((_FOLDER.parent / "_cuda.py").read_text(encoding="utf-8"))
    uses, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _final(node.value) in ("cuda", "_cuda"):
            names.add(node.attr)
        if not isinstance(node, ast.Call):
            continue
        function, arguments = node.func, node.args
        if isinstance(function, ast.Attribute) and function.attr in ("call", "free"):
            name, *arguments = arguments
            if isinstance(name, ast.Constant):
                starred = any(isinstance(each, ast.Starred) for each in arguments)
                uses[name.value] = None if starred else len(arguments)
        elif isinstance(function, ast.Attribute) and _final(function.value) in ("cuda", "_cuda"):
            uses[function.attr] = len(arguments)
    return uses | {name: uses.get(name) for name in names if name.startswith("cuda")}


@pytest.mark.parametrize("version", _CUDA)
def test_cuda_python(version):
    surface, lost = read_cuda(unpack(*_CUDA[version])), []
    uses = list_cuda_uses()
    assert len(uses) > 20
    for name, count in uses.items():
        if not surface.has("", name):
            lost.append(f"{name} is not there")
        elif count is None or name in surface.classes:
            continue
        elif not surface.takes("", name, count, ()):
            lost.append(f"{name} with {count}: {surface.signatures('', name)}")
    assert not lost, "\n".join(lost)
    for owner, names in _CUDA_VALUES.items():
        for name in names:
            assert surface.has(owner, f"cuda{name}"), f"{owner}.cuda{name}"
