"""onnxruntime without graphs: sessions that run nothing and write down what they are asked for."""

import functools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

CPU = "CPUExecutionProvider"
VOCABULARY = 12


class FakeError(Exception):
    """What onnxruntime raises."""


class FakeValue:
    """An OrtValue: an array and the device that it lies on."""

    def __init__(self, array, device="cpu", device_id=0, vendor=-1):
        del device_id
        # On the host it is the array itself, as onnxruntime has it.
        self.array = array if device == "cpu" else array.copy()
        self.device, self.vendor, self.updates = device, vendor, 0

    def update_inplace(self, array):
        self.array[...] = array
        self.updates += 1

    def data_ptr(self):
        return self.array.ctypes.data


class FakeBinding:
    def __init__(self):
        self.inputs, self.outputs, self.copies = {}, {}, []

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value

    def bind_cpu_input(self, name, array):
        self.inputs[name] = FakeValue(array.copy())
        self.copies.append(name)

    def bind_output(self, name, device, device_id, dtype, shape, pointer):
        assert (name, device, device_id, dtype) == ("logits", "cpu", 0, np.float32)
        assert shape == (1, VOCABULARY)
        assert pointer


def as_found(spec):
    """An input or output in onnxruntime's words."""
    kind = {"float32": "float"}.get(spec.dtype, spec.dtype)
    return SimpleNamespace(name=spec.name, type=f"tensor({kind})", shape=list(spec.shape))


class FakeSession:
    """A session that runs nothing. `ort` says where it would run and what it tells."""

    def __init__(self, ort, path, options, providers=None, enable_fallback=1):
        assert not enable_fallback
        ort.stdouts.append(sys.stdout)
        self.ort, self.path, self.options, self.providers = ort, path, options, providers
        if ort.failure:
            raise FakeError(ort.failure)
        wanted = [name for name, _ in providers or []] + [name for name, _ in options.added]
        started = [name for name in wanted if name not in ort.broken]
        self.started = [*started, *([] if CPU in started else [CPU])]
        self.stage = ort.stages[Path(path).name]
        self.runs = []
        ort.sessions.append(self)
        if ort.tells_places:
            self.get_input_memory_infos = lambda: [
                SimpleNamespace(name="Cpu" if name in ort.on_host else "Cuda")
                for name in (spec.name for spec in self.stage.inputs)
            ]
        if ort.parts is not None:
            self.get_provider_graph_assignment_info = lambda: [
                SimpleNamespace(
                    ep_name=name,
                    get_nodes=lambda operators=operators: [
                        SimpleNamespace(op_type=operator) for operator in operators
                    ],
                )
                for name, operators in ort.parts
            ]

    def get_providers(self):
        return self.started

    def get_inputs(self):
        return [as_found(spec) for spec in self.stage.inputs]

    def get_outputs(self):
        return [as_found(spec) for spec in self.stage.outputs]

    def io_binding(self):
        return FakeBinding()

    def run_with_iobinding(self, binding):
        seen = {name: value.array.copy() for name, value in binding.inputs.items()}
        self.runs.append((binding, seen))


class FakeOptions:
    def __init__(self):
        self.entries, self.added = {}, []

    def add_session_config_entry(self, key, value):
        self.entries[key] = value

    def add_provider_for_devices(self, devices, options):
        self.added += [(device.ep_name, options) for device in devices]


def make(stages):
    """An onnxruntime of the newest version that has the CPU alone; its fields say otherwise."""
    module = ModuleType("onnxruntime")
    module.__version__ = "1.31.1"
    module.available = [CPU]
    module.broken, module.failure = set(), ""
    module.tells_places, module.on_host, module.parts = True, set(), None
    module.sessions, module.registered, module.devices, module.stdouts = [], [], [], []
    module.stages = {stage.file: stage for stage in stages}
    module.get_available_providers = lambda: module.available
    module.SessionOptions = FakeOptions
    module.InferenceSession = functools.partial(FakeSession, module)
    module.OrtValue = SimpleNamespace(ortvalue_from_numpy=FakeValue)
    module.capi = SimpleNamespace(onnxruntime_pybind11_state=SimpleNamespace(Fail=FakeError))

    def register(name, path):
        module.registered.append((name, path))
        module.found = True

    module.found = False
    module.register_execution_provider_library = register
    module.get_ep_devices = lambda: module.devices if module.found else []
    return module
