"""onnxruntime's execution providers: what they are called, where they are found, their options.

Imports no library: everything here is settled before onnxruntime is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import provider_cache
from gap_runtime.bundle.manifest import DECODER, Stage
from gap_runtime.errors import ConfigError
from gap_runtime.machines.fat_binary import has_kernels
from gap_runtime.machines.target import list_targets, load_target

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
_GPU_WHEEL: Final = (
    "it is in onnxruntime-gpu: pip uninstall onnxruntime, then pip install 'gap-runtime[gpu]'"
)
_OPTION_PREFIXES: Final = {"tensorrt": "trt", "nvtensorrtrtx": "nv"}
_USER_INITIALIZERS: Final = (1, 23)
"""Since then TensorRT reads weights where they lie; before, 2 GB were the most it could take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider by onnxruntime's own name.

    `source` says how to get it. `plugin` is the import name of a package that brings it as a
    library of its own; empty where it is part of onnxruntime. `caches_in_place` is whether it may
    write a cache into the memory that it is read from, whatever operators do it.
    """

    name: str
    source: str
    plugin: str = ""
    caches_in_place: bool = True


PROVIDERS: Final = {
    "cpu": Provider(name=CPU, source="it is in every onnxruntime"),
    "cuda": Provider(name=CUDA, source=_GPU_WHEEL),
    "tensorrt": Provider(
        name="TensorrtExecutionProvider",
        # The provider is linked with libnvinfer.so.10 and CUDA 13; a plain `tensorrt` is 11.
        source=f"{_GPU_WHEEL}, and TensorRT's libraries with "
        "pip install 'tensorrt-cu13>=10.16,<11'",
        caches_in_place=False,
    ),
    "nvtensorrtrtx": Provider(
        name="NvTensorRTRTXExecutionProvider",
        source="pip install onnxruntime-ep-nv-tensorrt-rtx, beside onnxruntime 1.24 or newer "
        "(not onnxruntime-gpu)",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        caches_in_place=False,
    ),
}
"""By the name after the colon of `--backend onnxruntime:NAME`."""


def find_provider(device: str) -> Provider:
    """The provider that a device's name stands for.

    Raises:
        ConfigError: There is none of that name.
    """
    if device not in PROVIDERS:
        raise ConfigError(f"unknown onnxruntime device '{device}'; have {', '.join(PROVIDERS)}")
    return PROVIDERS[device]


def describe_lack(kernels: tuple[str, ...], gpus: list[str]) -> str:
    """What an onnxruntime lacks for a machine's GPUs; empty where it has kernels, or none knows.

    Args:
        kernels: Those that it has, from `list_kernels`.
        gpus: Compute capability of each.
    """
    if not kernels or not gpus or any(has_kernels(kernels, gpu) for gpu in gpus):
        return ""
    *first, last = dict.fromkeys(kernel.removesuffix("a") for kernel in kernels)
    has = f"{', '.join(first)} and {last}" if first else last
    builds = [
        name for name in list_targets() if set(load_target(name).compute_capabilities) & set(gpus)
    ]
    advice = (
        f"export with --target {' or '.join(builds)}, whose engines run on it"
        if builds
        else "export with --target cpu"
    )
    return (
        f"has kernels for compute capability {has} alone, the GPU here is of "
        f"{' and '.join(dict.fromkeys(gpus))}; {advice}"
    )


def writes_in_place(device: str, opset: int) -> bool:
    """Whether the cache may be bound as input and output at once.

    From opset 24 on the operator that writes it is made for that; TensorRT even wants it so. The
    plain operators of older graphs give TensorRT no such promise, so there are two caches then.
    """
    return opset >= 24 or not device or PROVIDERS[device].caches_in_place


def choose_options(
    device: str, bundle: Bundle, stage: Stage, version: tuple[int, ...]
) -> dict[str, str]:
    """The options of a provider for a stage.

    Args:
        device: A key of PROVIDERS.
        bundle: The opened bundle.
        stage: What will be run.
        version: Of onnxruntime.
    """
    if device == "cuda":
        # Its 10 bits would not pass the check against PyTorch's float32.
        return {"use_tf32": "0"}
    prefix = _OPTION_PREFIXES.get(device)
    if prefix is None:
        return {}
    options: dict[str, str] = {}
    workspace = bundle.manifest.target.workspace_mib
    if workspace is not None:
        options[f"{prefix}_max_workspace_size"] = str(workspace * 2**20)
    if stage.role == DECODER:
        options |= _profile(prefix, bundle, stage)
    folder = provider_cache(bundle, f"onnxruntime-{device}")
    if device == "nvtensorrtrtx":
        return options if folder is None else options | {"nv_runtime_cache_path": str(folder)}
    # Without permission for lower precision the network is strongly typed: float16 is where the
    # graph says so, and float32 islands stay.
    options["trt_fp16_enable"] = "0"
    if version >= _USER_INITIALIZERS:
        options["trt_load_user_initializer"] = "1"
    if folder is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_engine_cache_prefix": stage.name,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return options


def _profile(prefix: str, bundle: Bundle, stage: Stage) -> dict[str, str]:
    """Row counts of the decoder: one for a step, at most the longest prompt's.

    Kernels are chosen for the prefill: a step waits for the weights whatever they are, while a
    prefill with kernels made for one row would be slow.
    """
    layout = bundle.manifest.layout
    rows = max(layout.at(entry).prompt for entry in bundle.manifest.ratios)
    free = [spec for spec in stage.inputs if any(isinstance(size, str) for size in spec.shape)]

    def shapes(count: int) -> str:
        return ",".join(f"{spec.name}:{'x'.join(map(str, spec.shape_at(count)))}" for spec in free)

    return {
        f"{prefix}_profile_min_shapes": shapes(1),
        f"{prefix}_profile_opt_shapes": shapes(rows),
        f"{prefix}_profile_max_shapes": shapes(rows),
    }


def describe_strangers(nodes: Iterable[tuple[str, str]], wanted: str) -> str:
    """What runs elsewhere than on the wanted provider, in one line; empty where nothing does.

    Args:
        nodes: Provider and operator of every node of the graph.
        wanted: The provider that was asked for.
    """
    listed = list(nodes)
    parts = []
    for provider in sorted({each for each, _ in listed if each != wanted}):
        counts = Counter(operator for each, operator in listed if each == provider)
        names = ", ".join(
            operator if count == 1 else f"{operator} x{count}"
            for operator, count in sorted(counts.items())
        )
        parts.append(f"{counts.total()} of {len(listed)} nodes run on {provider} ({names})")
    return f"{'; '.join(parts)}, not on {wanted}" if parts else ""
