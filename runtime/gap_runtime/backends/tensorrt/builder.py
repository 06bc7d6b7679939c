"""From a bundle's graphs to engines: parse, prove, build, write aside, put in place."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any, Final

from gap_runtime.backends._cuda import Device
from gap_runtime.backends.tensorrt.library import (
    RTX,
    choose_package,
    describe_platform,
    dtype_name,
    find_mismatch,
    last_error,
    load_engine,
    make_builder,
    make_log,
    package_name,
    scratch_bytes,
    write_engine,
)
from gap_runtime.backends.tensorrt.rules import estimate_build, read_graph, require_room
from gap_runtime.backends.tensorrt.slots import attend_to_used_slots
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.engines import (
    BuildReport,
    BuildRequest,
    BuiltEngine,
    EngineRecord,
    describe_engine,
    engine_file,
    engine_folder,
    find_fault,
    identify_weights,
    list_profiles,
    list_stages,
    new_engine,
    read_engine_record,
    require_readable,
    write_engine_record,
)
from gap_runtime.bundle.files import user_cache, write_whole
from gap_runtime.bundle.manifest import DECODER, Stage
from gap_runtime.bundle.tensors import TensorSpec
from gap_runtime.display import Display
from gap_runtime.errors import ConfigError, EngineError
from gap_runtime.records.files import is_file, read_bytes

_OPTIONS: Final = ("package",)
_ATTENTION_ADVICE: Final = (
    "; its attention kernels take heads of 16 and more in float16: export with --dtype float16, "
    "or in plain operators with --target portable"
)
_BUILDER: Final = "IBuilder::"
"""How messages of what cannot be built begin."""
_CACHE_LAYER: Final = "KV_CACHE_UPDATE"
_ATTENTION_LAYERS: Final = ("ATTENTION_INPUT", "ATTENTION_OUTPUT")
_UNUSED: Final = "Unused Input"
"""How the library warns of an input of a node that it ignores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What all stages of a build share. `gpu` is null where engines are for a GPU elsewhere."""

    bundle: Bundle
    request: BuildRequest
    trt: ModuleType
    gpu: Device | None
    capabilities: tuple[str, ...]
    folder: Path
    display: Display


def build_engines(bundle: Bundle, request: BuildRequest, display: Display) -> BuildReport:
    """Make the engines that are missing or stale, keep those that are good.

    Raises:
        ConfigError: The target does not fit the bundle, the package or the GPU.
        EngineError: There is no TensorRT, no GPU, no room, or a graph cannot be built.
    """
    unknown = sorted(set(request.options) - set(_OPTIONS))
    if unknown:
        raise ConfigError(f"unknown setting 'tensorrt.{unknown[0]}'; have tensorrt.package")
    require_readable(bundle, request.target)
    trt = choose_package(request.target, request.options.get("package"))
    capabilities, gpu = _choose_gpu(trt, request)
    named = request.compute_capabilities
    job = _Job(
        bundle=bundle,
        request=request,
        trt=trt,
        gpu=gpu,
        capabilities=capabilities,
        folder=engine_folder(bundle, request.target.name, named),
        display=display,
    )
    stages = list_stages(bundle, request.entries)
    for stage in stages:
        # What the target cannot read is said before minutes go into another stage.
        read_graph(bundle, stage, request.target)
    engines = tuple(_provide(job, stage) for stage in stages)
    return BuildReport(
        bundle=str(bundle.folder),
        target=request.target.name,
        package=package_name(trt),
        version=trt.__version__,
        compute_capabilities=capabilities,
        folder=str(job.folder),
        engines=engines,
    )


def _choose_gpu(trt: ModuleType, request: BuildRequest) -> tuple[tuple[str, ...], Device | None]:
    """Compute capabilities to build for, and this machine's GPU where it is the one."""
    target, named = request.target, request.compute_capabilities
    rtx = package_name(trt) == RTX
    if named and not rtx:
        raise ConfigError(
            f"--compute-capability {named[0]}: {package_name(trt)} builds for the GPU of this "
            "machine alone; run the build on the device, without this option"
        )
    gpu = None
    if not named:
        try:
            gpu = Device()
        except EngineError as error:
            advice = (
                "name the GPU to build for: --compute-capability "
                + " or ".join(target.compute_capabilities)
                if rtx
                else f"{package_name(trt)} builds on the device that runs the engine"
            )
            raise type(error)(f"{error}; {advice}") from error
        named = (gpu.compute_capability,)
    for each in named:
        if target.compute_capabilities and each not in target.compute_capabilities:
            raise ConfigError(
                f"target '{target.name}' is for compute capability "
                f"{', '.join(target.compute_capabilities)}, found {each}; choose another --target"
            )
        if rtx and not hasattr(trt.ComputeCapability, _sm(each)):
            known = sorted(n for n in dir(trt.ComputeCapability) if n.startswith("SM"))
            raise ConfigError(
                f"{package_name(trt)} {trt.__version__} does not build for compute capability "
                f"{each}; it has {', '.join(known)}"
            )
    return named, gpu


def _sm(capability: str) -> str:
    return f"SM{capability.replace('.', '')}"


def _provide(job: _Job, stage: Stage) -> BuiltEngine:
    """The engine of a stage: the one that is there, or a new one."""
    bundle, folder = job.bundle, job.folder
    path = engine_file(folder, stage.name)
    profiles = (
        list_profiles(bundle.manifest.layout, job.request.entries) if stage.role == DECODER else ()
    )
    record = read_engine_record(folder, stage.name)
    if record is not None:
        fault = find_fault(bundle, stage, folder) or find_mismatch(
            record, job.trt, job.capabilities
        )
        same = record.compute_capabilities == job.capabilities
        if not fault and same and set(profiles) <= set(record.profiles):
            if not job.request.is_forced:
                return BuiltEngine(file=str(path), is_reused=True, record=record)
        elif not fault and same:
            # Ratios that were built before stay: the weights are the same for all of them.
            profiles = (*sorted({*profiles[:-1], *record.profiles[:-1]}), profiles[-1])
        else:
            reason = fault or "it is for other GPUs"
            job.display.say(f"{path.name}: {reason}; it is built again")
    return BuiltEngine(file=str(path), is_reused=False, record=_build(job, stage, profiles))


def _build(job: _Job, stage: Stage, profiles: tuple[int, ...]) -> EngineRecord:
    bundle, request = job.bundle, job.request
    graph = read_graph(bundle, stage, request.target)
    needs = estimate_build(graph, request.target)
    # Where the GPU's memory is the machine's, CUDA does not count what the system would give back.
    shared = job.gpu is not None and job.gpu.shares_memory
    free = job.gpu.free_bytes if job.gpu and not shared else None
    require_room(job.folder, stage.name, needs, free_device=free, is_shared=shared)
    began = time.perf_counter()
    stop = Event()
    with (
        new_engine(job.folder, stage.name) as aside,
        job.display.progress(f"building {stage.name}") as report,
    ):

        def work() -> Counter[str]:
            return _compile(job, stage, profiles, aside, _make_monitor(job.trt, report, stop))

        # In a thread of its own, so that Ctrl-C is heard while the library works.
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(work)
            try:
                layers = future.result()
            except KeyboardInterrupt:
                stop.set()
                raise
        size, found_hash = describe_engine(aside)
        record = EngineRecord(
            stage=stage.name,
            target=request.target.name,
            package=package_name(job.trt),
            version=job.trt.__version__,
            platform=describe_platform(),
            compute_capabilities=job.capabilities,
            precision=bundle.manifest.precision,
            graph_blake3=bundle.manifest.files[stage.file].blake3,
            weights_blake3=identify_weights(bundle),
            profiles=profiles,
            is_cache_in_place=layers[_CACHE_LAYER] > 0,
            layers=dict(sorted(layers.items())),
            build_seconds=round(time.perf_counter() - began, 3),
            size=size,
            blake3=found_hash,
            device_memory_bytes=_measure(job, aside) if job.gpu else None,
        )
    write_engine_record(job.folder, record)
    return record


def _compile(
    job: _Job, stage: Stage, profiles: tuple[int, ...], aside: Path, monitor: Any
) -> Counter[str]:
    """Write the engine of a stage to a file; the layers of the parsed network by kind."""
    trt, path = job.trt, (job.bundle.folder / stage.file).resolve()
    log = make_log(trt)
    builder = make_builder(trt, log)
    warned = len(log.warnings)
    # The network points into weights that the parser holds.
    network, _parser = parse(trt, log, builder, path)
    require_interface(network, stage, path)
    replaced = attend_to_used_slots(trt, network) if stage.role == DECODER else 0
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    # On by default; its 10 bits would not pass the check against PyTorch's float32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if job.request.target.workspace_mib is not None:
        config.set_memory_pool_limit(
            trt.MemoryPoolType.WORKSPACE, job.request.target.workspace_mib * 2**20
        )
    if package_name(trt) == RTX:
        # Without it the runtime may allocate while it runs, which a CUDA graph must not.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(job.capabilities)
        for k, capability in enumerate(job.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, _sm(capability)), k)
    for rows in profiles:
        profile = builder.create_optimization_profile()
        for spec in stage.inputs:
            if any(isinstance(size, str) for size in spec.shape):
                shape = spec.shape_at(rows)
                profile.set_shape(spec.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    save_timings = _load_timings(job, config)
    with aside.open("wb") as file:
        is_built = write_engine(trt, builder, network, config, file)
        file.flush()
        os.fsync(file.fileno())
    if not is_built:
        # After a build that failed, a machine without a GPU is told so, too.
        reason = last_error(log, _BUILDER)
        advice = _ATTENTION_ADVICE if "ttention" in reason else ""
        raise EngineError(
            f"{path}: {package_name(trt)} {trt.__version__} could not build it: {reason}{advice}"
        )
    _require_heeded(trt, log.warnings[warned:], path)
    save_timings()
    kinds = (network.get_layer(k).type for k in range(network.num_layers))
    layers = Counter(str(kind).rpartition(".")[2].partition(":")[0] for kind in kinds)
    if replaced:
        # Those that nothing reads are still listed.
        layers.subtract(dict.fromkeys(_ATTENTION_LAYERS, replaced))
    return layers


def parse(trt: ModuleType, log: Any, builder: Any, path: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, strongly typed, and the parser, which it needs to live.

    Raises:
        EngineError: The parser does not take it.
    """
    # Later versions know no other networks than strongly typed ones, and no flag for them.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(path))
    problems = [_describe_problem(parser.get_error(k)) for k in range(parser.num_errors)]
    if not parsed or problems:
        raise EngineError(
            f"{path}: {package_name(trt)} {trt.__version__} cannot read it: "
            f"{'; '.join(problems) or last_error(log)}"
        )
    return network, parser


def _require_heeded(trt: ModuleType, warnings: list[str], path: Path) -> None:
    """Refuse an engine that leaves out an input of the graph, which TensorRT only warns of.

    Raises:
        EngineError: With the warning, which comes while parsing or while building.
    """
    ignored = [message for message in warnings if _UNUSED in message]
    if ignored:
        raise EngineError(
            f"{path}: {package_name(trt)} {trt.__version__} ignores a part of it: "
            f"{' '.join(ignored[0].split())}"
        )


def _describe_problem(error: Any) -> str:
    node = error.node_name() or f"number {error.node()}"
    code = str(error.code()).rpartition(".")[2].partition(":")[0]
    return f"node '{node}' ({error.node_operator()}): {code} {' '.join(error.desc().split())}"


def require_interface(network: Any, stage: Stage, path: Path) -> None:
    """Refuse a network whose inputs and outputs are not those of the manifest.

    Raises:
        EngineError: A name, dtype or dimension differs.
    """
    sides = (
        ("input", stage.inputs, network.num_inputs, network.get_input),
        ("output", stage.outputs, network.num_outputs, network.get_output),
    )
    for side, specs, count, find in sides:
        found = {tensor.name: tensor for tensor in map(find, range(count))}
        lost = [spec.name for spec in specs if spec.name not in found]
        unknown = sorted(set(found) - {spec.name for spec in specs})
        if lost or unknown:
            what = f"has no {side} '{lost[0]}'" if lost else f"has a further {side} '{unknown[0]}'"
            raise EngineError(f"{path}: {what}; the manifest says otherwise, export again")
        for spec in specs:
            _require_tensor(found[spec.name], spec, side, path)


def _require_tensor(tensor: Any, spec: TensorSpec, side: str, path: Path) -> None:
    dtype = dtype_name(tensor.dtype)
    if dtype != spec.dtype:
        raise EngineError(
            f"{path}: {side} '{spec.name}' is {dtype}, the manifest says {spec.dtype}; "
            "export again"
        )
    shape = tuple(tensor.shape)
    wanted = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
    if shape != wanted:
        kind = "has an open dimension" if -1 in shape and -1 not in wanted else "has the shape"
        raise EngineError(
            f"{path}: {side} '{spec.name}' {kind} {list(shape)}, the manifest says "
            f"{list(spec.shape)}; export again"
        )


def _make_monitor(trt: ModuleType, report: Callable[[float, str], None], stop: Event) -> Any:
    """Hands the library's progress on, and the wish to stop back."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            # Steps done and steps in all of every phase under way, the outermost first.
            self._phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (0, max(num_steps, 1))
            self._show()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name] = (step + 1, self._phases[phase_name][1])
            self._show()
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _show(self) -> None:
            share = 0.0
            for done, steps in reversed(self._phases.values()):
                share = min((done + share) / steps, 1.0)
            report(share, next(iter(self._phases), ""))

    return Monitor()


def _load_timings(job: _Job, config: Any) -> Callable[[], None]:
    """Give the builder what it measured in earlier builds; what saves it afterwards."""
    if package_name(job.trt) == RTX:
        # It measures nothing at a build.
        return lambda: None
    try:
        path = job.request.timing_cache or default_timing_cache(job.trt, job.capabilities[0])
    except OSError as error:
        job.display.say(f"timings cannot be kept ({error.strerror})")
        return lambda: None
    known = read_bytes(path, EngineError) if is_file(path) else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        job.display.say(f"{path}: timings of another device or version; they are measured again")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def save() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(path) as aside:
                aside.write_bytes(config.get_timing_cache().serialize())
        except OSError as error:
            job.display.say(f"{path}: timings cannot be kept ({error.strerror})")

    return save


def default_timing_cache(trt: ModuleType, capability: str) -> Path:
    """Where timings of this device and version are kept.

    Raises:
        OSError: The user has no place for them.
    """
    name = f"timing-{package_name(trt)}-{trt.__version__}-{_sm(capability).lower()}.cache"
    return user_cache() / name


def _measure(job: _Job, path: Path) -> int:
    """Scratch memory of an engine on this machine's GPU, which proves that it loads.

    Raises:
        EngineError: It does not load.
    """
    log = make_log(job.trt)
    engine = load_engine(job.trt, log, path)
    return int(scratch_bytes(engine))
