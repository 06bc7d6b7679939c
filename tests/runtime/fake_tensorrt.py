# ruff: noqa: N802, N815 - the names are those of CUDA
"""TensorRT and CUDA without a GPU: the same calls, on host memory, with a function as the engine.

Everything up to the launch is the real thing: which memory is allocated, copied, bound and where.
What an engine computes is `compute(path, inputs) -> outputs`, for example onnxruntime. Rules that
hold on a GPU are asserted: copies stay inside their memory, fresh memory is not zero, tensors
that are no aliases do not overlap, only what was enqueued during a capture is replayed.
"""

import ctypes
import json
import types
import weakref
from pathlib import Path

import numpy as np

SUCCESS, NO_DRIVER, NO_CAPTURE = 0, 35, 900
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
NUMPY = {"bfloat16": "uint16"}


class FakeCuda(types.ModuleType):
    """cuda.bindings.runtime with one device."""

    def __init__(self, *, devices=1, capability=(8, 9), free=2**33, can_capture=True):
        super().__init__("cuda.bindings.runtime")
        self.devices, self.capability, self.free = devices, capability, free
        self.can_capture = can_capture
        self.blocks, self.recording, self.graphs = {}, None, []
        self.counts = {"malloc": 0, "free": 0, "launch": 0, "enqueue": 0}
        self.cudaDeviceAttr = types.SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor=75,
            cudaDevAttrComputeCapabilityMinor=76,
            cudaDevAttrIntegrated=18,
        )
        self.is_integrated, self.loads_driver, self.last_error = False, True, SUCCESS
        self.cudaMemcpyKind = types.SimpleNamespace(
            cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
        )
        self.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def cudaGetDeviceCount(self):
        if not self.loads_driver:
            # As cuda-python 12.6 does.
            raise RuntimeError("Failed to dlopen libcuda.so.1")
        return (SUCCESS, self.devices) if self.devices else (NO_DRIVER, None)

    def cudaGetErrorString(self, status):
        return SUCCESS, {NO_DRIVER: b"no driver"}.get(status, b"not allowed")

    def cudaSetDevice(self, _index):
        return (SUCCESS,)

    def cudaDeviceGetAttribute(self, attribute, _index):
        if attribute == self.cudaDeviceAttr.cudaDevAttrIntegrated:
            return SUCCESS, int(self.is_integrated)
        return SUCCESS, self.capability[attribute - 75]

    def cudaMemGetInfo(self):
        return SUCCESS, self.free, 2 * self.free

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1
        return SUCCESS, 7

    def cudaStreamSynchronize(self, stream):
        assert stream == 7
        assert self.recording is None
        return (SUCCESS,)

    def cudaMalloc(self, size):
        self.counts["malloc"] += 1
        block = (ctypes.c_ubyte * size).from_buffer(bytearray(b"\xff" * size))
        self.blocks[ctypes.addressof(block)] = block
        return SUCCESS, ctypes.addressof(block)

    def cudaHostAlloc(self, size, _flags):
        return self.cudaMalloc(size)

    def cudaFree(self, address):
        self.counts["free"] += 1
        del self.blocks[address]
        return (SUCCESS,)

    cudaFreeHost = cudaFree

    def require_inside(self, address, size):
        inside = any(
            start <= address and address + size <= start + len(block)
            for start, block in self.blocks.items()
        )
        assert inside, "outside of what was allocated"

    def cudaMemsetAsync(self, address, value, size, _stream):
        self.require_inside(address, size)
        ctypes.memset(address, value, size)
        return (SUCCESS,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert (kind in (1, 2), stream) == (True, 7)
        self.require_inside(to, size)
        self.require_inside(source, size)
        self.submit(lambda: ctypes.memmove(to, source, size))
        return (SUCCESS,)

    def cudaMemcpy2DAsync(self, to, to_pitch, source, pitch, width, rows, kind, stream):
        assert (kind, stream) == (3, 7)
        assert width <= min(to_pitch, pitch)
        self.require_inside(to, (rows - 1) * to_pitch + width)
        self.require_inside(source, (rows - 1) * pitch + width)
        for row in range(rows):
            ctypes.memmove(to + row * to_pitch, source + row * pitch, width)
        return (SUCCESS,)

    def submit(self, work):
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaStreamBeginCapture(self, _stream, _mode):
        assert self.recording is None
        self.recording = []
        return (SUCCESS,)

    def cudaStreamEndCapture(self, _stream):
        work, self.recording = self.recording, None
        if self.can_capture:
            return SUCCESS, work
        # It stays set until somebody asks.
        self.last_error = NO_CAPTURE
        return NO_CAPTURE, None

    def cudaGetLastError(self):
        error, self.last_error = self.last_error, SUCCESS
        return (error,)

    def cudaGraphInstantiate(self, graph, _flags):
        self.graphs.append(graph)
        return SUCCESS, len(self.graphs) - 1

    def cudaGraphDestroy(self, _graph):
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, _handle):
        return (SUCCESS,)

    def cudaGraphLaunch(self, handle, stream):
        assert stream == 7
        self.counts["launch"] += 1
        for work in self.graphs[handle]:
            work()
        return (SUCCESS,)


class FakeGraph:
    """What the fake parser finds in a graph: the manifest's stage, with changes."""

    def __init__(self, stage, layers=(), errors=(), warnings=()):
        self.stage, self.layers = stage, layers
        self.errors, self.warnings = errors, warnings


class FakeTensorrt(types.ModuleType):
    """The parts of TensorRT's API that are used; `graphs` are by file name."""

    def __init__(self, name, version, cuda, compute=None):
        super().__init__(name)
        self.__version__ = version
        self.cuda, self.compute = cuda, compute
        self.graphs, self.configs, self.stop_at = {}, [], None
        self.build_error, self.starts = None, True
        self.is_rtx, self.is_capturable, self.contexts = name == "tensorrt_rtx", True, []
        self.compiled = []
        # What engines need while they run, by their graph's file; 4096 bytes of the others.
        self.scratch = {}
        trt = self

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

        class IProgressMonitor:
            pass

        class IStreamWriter:
            pass

        self.ILogger, self.IProgressMonitor = ILogger, IProgressMonitor
        builder = _OldBuilder
        if version != "10.3.0":
            self.IStreamWriter, builder = IStreamWriter, _Builder
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
        self.ComputeCapability = types.SimpleNamespace(SM80=80, SM86=86, SM89=89, SM120=120)
        self.TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
        self.BuilderFlag = types.SimpleNamespace(TF32="tf32")
        if self.is_rtx:
            self.BuilderFlag.REQUIRE_USER_ALLOCATION = "require-user-allocation"
            self.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER=1)
        self.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED=2)
        self.Builder = _bind(builder, trt)
        for kind in (_Parser, _Runtime):
            setattr(self, kind.__name__.strip("_"), _bind(kind, trt))
        self.OnnxParser = self.Parser

    def add_bundle(self, bundle, *, is_in_place=True):
        """Let the parser know the graphs of a bundle."""
        for stage in bundle.manifest.stages:
            caches = sum(spec.name.startswith("cache_") for spec in stage.inputs)
            layers = ["KV_CACHE_UPDATE"] * caches if is_in_place else ["SELECT"]
            self.graphs[stage.file] = FakeGraph(stage, layers)


def _bind(kind, trt):
    def make(*arguments):
        return kind(trt, *arguments)

    return make


def _tensors(specs):
    return [
        types.SimpleNamespace(
            name=spec.name,
            dtype=f"DataType.{spec.dtype}",
            shape=tuple(-1 if isinstance(size, str) else size for size in spec.shape),
        )
        for spec in specs
    ]


def _require_start(trt, log):
    """What the bindings make of a null from the library."""
    if not trt.starts:
        log.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")


class _OldBuilder:
    def __init__(self, trt, log):
        _require_start(trt, log)
        self.trt, self.log = trt, log

    def create_network(self, flags):
        assert flags == 1 << self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return types.SimpleNamespace(num_inputs=0, num_outputs=0, num_layers=0)

    def create_builder_config(self):
        config = _Config()
        self.trt.configs.append(config)
        return config

    def create_optimization_profile(self):
        profile = types.SimpleNamespace(shapes={})

        def set_shape(name, low, best, high):
            assert low == best == high
            profile.shapes[name] = list(low)

        profile.set_shape = set_shape
        return profile

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            monitor.phase_start("Timing", "Building", 1)
            goes_on = monitor.step_complete("Timing", 0)
            monitor.phase_finish("Timing")
            if self.trt.stop_at is not None:
                self.trt.stop_at(monitor)
            if not (goes_on and monitor.step_complete("Building", step)):
                return None
        monitor.phase_finish("Building")
        if self.trt.build_error:
            self.log.log(self.trt.ILogger.ERROR, self.trt.build_error)
            return None
        for warning in self.trt.graphs[Path(network.path).name].warnings:
            self.log.log(self.trt.ILogger.WARNING, warning)
        profiles = [profile.shapes for profile in config.profiles]
        return json.dumps({"path": network.path, "profiles": profiles}).encode()


class _Builder(_OldBuilder):
    """Of versions that write an engine piece by piece."""

    def build_serialized_network_to_stream(self, network, config, writer):
        engine = self.build_serialized_network(network, config)
        if engine is None:
            return False
        middle = len(engine) // 2
        for piece in (engine[:middle], engine[middle:]):
            if writer.write(piece) != len(piece):
                self.log.log(self.trt.ILogger.ERROR, "a piece was not written")
                return False
        return True


class _Config:
    def __init__(self):
        self.profiles, self.pools, self.capabilities, self.cache = [], {}, {}, None
        self.num_compute_capabilities = None
        self.progress_monitor = None
        self.flags = {"tf32"}

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.remove(flag)

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def set_compute_capability(self, capability, index):
        self.capabilities[index] = capability

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)

    def create_timing_cache(self, data):
        return types.SimpleNamespace(data=data, serialize=lambda: b"timings:" + data)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.data.startswith(b"foreign"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class _Parser:
    def __init__(self, trt, network, log):
        self.trt, self.network, self.log = trt, network, log
        self.num_errors = 0

    def parse_from_file(self, path):
        assert Path(path).is_absolute()
        graph, network = self.trt.graphs[Path(path).name], self.network
        inputs, outputs = _tensors(graph.stage.inputs), _tensors(graph.stage.outputs)
        network.path = path
        network.num_inputs, network.get_input = len(inputs), inputs.__getitem__
        network.num_outputs, network.get_output = len(outputs), outputs.__getitem__
        network.num_layers = len(graph.layers)
        network.get_layer = lambda k: types.SimpleNamespace(type=f"LayerType.{graph.layers[k]}")
        self.errors, self.num_errors = graph.errors, len(graph.errors)
        return not graph.errors

    def get_error(self, k):
        name, operator, text = self.errors[k]
        return types.SimpleNamespace(
            node_name=lambda: name,
            node_operator=lambda: operator,
            node=lambda: 0,
            code=lambda: "ErrorCode.UNSUPPORTED_NODE",
            desc=lambda: text,
        )


class _Runtime:
    def __init__(self, trt, log):
        _require_start(trt, log)
        self.trt, self.log = trt, log

    def deserialize_cuda_engine(self, data):
        try:
            told = json.loads(bytes(data))
        except ValueError:
            self.log.log(self.trt.ILogger.ERROR, "magic tag\ndoes not match")
            return None
        return _Engine(self.trt, told)


class _Engine:
    def __init__(self, trt, told):
        self.trt, self.path, self.profiles = trt, told["path"], told["profiles"]
        self.graph = trt.graphs[Path(self.path).name]
        self.device_memory_size_v2 = trt.scratch.get(Path(self.path).name, 4096)

    @property
    def _tensors(self):
        stage = self.graph.stage
        sides = {"in": _tensors(stage.inputs), "out": _tensors(stage.outputs)}
        return {each.name: (side, each) for side in sides for each in sides[side]}

    @property
    def num_io_tensors(self):
        return len(self._tensors)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        return self._tensors[name][0]

    def get_tensor_dtype(self, name):
        return self._tensors[name][1].dtype

    def get_tensor_shape(self, name):
        return self._tensors[name][1].shape

    def get_aliased_input_tensor(self, name):
        is_in_place = "KV_CACHE_UPDATE" in self.graph.layers and name.startswith("next_")
        return name.removeprefix("next_") if is_in_place else None

    def create_runtime_config(self):
        assert self.trt.is_rtx
        return _RuntimeConfig(self.trt)

    def create_execution_context(self, settings):
        managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.trt.is_rtx:
            assert settings.strategy == managed
            assert settings.dynamic_shapes_kernel_specialization_strategy == 1
            settings.cache.compile(self.path)
        else:
            assert settings == managed
        context = _Context(self)
        self.trt.contexts.append(weakref.ref(context))
        if self.trt.is_rtx:
            context.is_stream_capturable = lambda stream: stream == 7 and self.trt.is_capturable
        return context


class _RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = 0

    def __init__(self, trt):
        self.trt, self.strategy, self.cache = trt, 0, None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return _RuntimeCache(self.trt)

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class _RuntimeCache:
    """Kernels by the engine that they are of; `trt.compiled` has each that was compiled anew."""

    MAGIC = b"kernels:"

    def __init__(self, trt):
        self.trt, self.kernels = trt, []

    def deserialize(self, blob):
        if not blob.startswith(self.MAGIC):
            return False
        self.kernels = json.loads(blob[len(self.MAGIC) :])
        return True

    def serialize(self):
        return self.MAGIC + json.dumps(self.kernels).encode()

    def compile(self, name):
        if name not in self.kernels:
            self.kernels.append(name)
            self.trt.compiled.append(name)


class _Context:
    def __init__(self, engine):
        self.engine, self.cuda = engine, engine.trt.cuda
        self.profile, self.addresses, self.shapes, self.scratch = None, {}, {}, None
        stage = engine.graph.stage
        self.inputs = {spec.name: spec for spec in stage.inputs}
        self.outputs = {spec.name: spec for spec in stage.outputs}

    def set_optimization_profile_async(self, index, stream):
        assert stream == 7
        if index >= max(len(self.engine.profiles), 1):
            return False
        self.profile = self.engine.profiles[index] if self.engine.profiles else {}
        return True

    def set_device_memory(self, address, size):
        self.cuda.require_inside(address, size)
        assert size >= self.engine.device_memory_size_v2
        self.scratch = address

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return list(shape) == self.profile[name]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.inputs or name in self.outputs

    def execute_async_v3(self, stream):
        assert stream == 7
        assert self.scratch is not None
        self.cuda.counts["enqueue"] += 1
        addresses, scratch = dict(self.addresses), self.scratch
        self._require_apart(addresses)
        self.cuda.submit(lambda: self._compute(addresses, scratch))
        return True

    def _require_apart(self, addresses):
        places = {}
        for name in (*self.inputs, *self.outputs):
            alias = self.engine.get_aliased_input_tensor(name)
            if alias:
                assert addresses[name] == addresses[alias], f"{name} is to be in place"
                continue
            self.cuda.require_inside(addresses[name], self._size(name))
            for start, end in places.values():
                assert addresses[name] >= end or addresses[name] + self._size(name) <= start
            places[name] = (addresses[name], addresses[name] + self._size(name))

    def _shape(self, name):
        spec = self.inputs.get(name) or self.outputs[name]
        if name in self.shapes:
            return self.shapes[name]
        # The free dimensions of an output are those of the inputs that have set them.
        free = {
            size: self.shapes[each.name][k]
            for each in self.inputs.values()
            for k, size in enumerate(each.shape)
            if isinstance(size, str)
        }
        return tuple(free.get(size, size) for size in spec.shape)

    def _size(self, name):
        spec = self.inputs.get(name) or self.outputs[name]
        return int(np.prod(self._shape(name))) * BYTES[spec.dtype]

    def _view(self, name, addresses):
        spec = self.inputs.get(name) or self.outputs[name]
        raw = (ctypes.c_ubyte * self._size(name)).from_address(addresses[name])
        dtype = NUMPY.get(spec.dtype, spec.dtype)
        return np.frombuffer(raw, np.uint8).view(dtype).reshape(self._shape(name))

    def _compute(self, addresses, scratch):
        # What lies there is written over, and has to be there still where a graph is launched.
        self.cuda.require_inside(scratch, self.engine.device_memory_size_v2)
        ctypes.memset(scratch, 0xAB, self.engine.device_memory_size_v2)
        inputs = {name: self._view(name, addresses).copy() for name in self.inputs}
        outputs = self.engine.trt.compute(self.engine.path, inputs)
        for name in self.outputs:
            view = self._view(name, addresses)
            assert (outputs[name].shape, outputs[name].dtype) == (view.shape, view.dtype), name
            view[...] = outputs[name]


def _varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number, content):
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    content = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def encode_onnx(*, inputs, outputs, nodes=None, weights=(), opset=24, domain=""):
    """An ONNX file's bytes.

    `nodes` are (name, operator, domain, inputs), by default one that reads every input; `weights`
    are (name, file, offset, length).
    """
    nodes = [("all", "Concat", "", list(inputs))] if nodes is None else nodes
    graph = b""
    for name, operator, where, read in nodes:
        node = b"".join(_field(1, each) for each in read)
        graph += _field(1, node + _field(3, name) + _field(4, operator) + _field(7, where))
    for name, file, offset, length in weights:
        told = {"location": file, "offset": str(offset), "length": str(length)}
        entries = (_field(13, _field(1, k) + _field(2, v)) for k, v in told.items())
        graph += _field(5, _field(1, 3) + _field(8, name) + b"".join(entries))
    graph += b"".join(_field(11, _field(1, name)) for name in inputs)
    graph += b"".join(_field(12, _field(1, name)) for name in outputs)
    return _field(1, 10) + _field(7, graph) + _field(8, _field(1, domain) + _field(2, opset))
