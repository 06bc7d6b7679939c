"""The cache of a decoder session, against a list of what was written."""

import itertools

import numpy as np
import pytest

from gap_runtime.backends._kv_cache import KvCache, cache_specs, make_arrays
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER
from gap_runtime.bundle.tensors import TensorSpec


@pytest.fixture
def stage(make_bundle):
    return Bundle.open(make_bundle()).manifest.stage(DECODER)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_call_reads_what_all_calls_before_it_wrote(stage, in_place):
    cache = KvCache(stage, lambda spec: np.zeros(spec.fixed_shape()), in_place=in_place)
    assert cache.sides == (1 if in_place else 2)
    name = cache_specs(stage)[0].name
    slots = cache.inputs(0)[name].shape[2]
    for slot in range(min(slots, 5)):
        read = cache.inputs(cache.side)[name]
        written = cache.outputs(cache.side)[f"next_{name}"]
        assert (read is written) == in_place
        # What a graph does: a copy of the old cache with one row more.
        written[:] = read
        written[:, :, slot] = slot + 1
        cache.turn()
        found = cache.inputs(cache.side)[name][0, 0, :, 0]
        np.testing.assert_array_equal(found[: slot + 1], np.arange(1, slot + 2))
        assert not found[slot + 1 :].any()


def test_it_has_every_tensor_of_the_graphs_cache_once_a_side(stage):
    made = []
    cache = KvCache(stage, lambda spec: made.append(spec.name), in_place=False)
    wanted = [spec.name for spec in stage.inputs if "cache" in spec.name]
    assert made == wanted + wanted
    assert list(cache.inputs(1)) == wanted
    assert set(cache.outputs(1)) == {"next_cache_key_00", "next_cache_value_00"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_its_arrays_lie_side_by_side_and_share_nothing(dtype):
    """In one piece, as only a piece of 4 MiB is given huge pages."""
    # Of sizes that fill no line of 64 bytes.
    specs = [
        TensorSpec(name=f"cache_{k}", dtype=dtype, shape=(1, 1, 3 + k, 7), meaning="")
        for k in range(4)
    ]
    arrays = make_arrays(specs)
    assert [(n, str(a.dtype), a.shape) for n, a in arrays.items()] == [
        (spec.name, dtype, spec.shape) for spec in specs
    ]
    for k, array in enumerate(arrays.values()):
        assert array.flags.c_contiguous
        assert not array.any()
        array[:] = k + 1
    assert all((a == k + 1).all() for k, a in enumerate(arrays.values()))
    places = [array.ctypes.data for array in arrays.values()]
    assert [(b - a) % 64 for a, b in itertools.pairwise(places)] == [0, 0, 0]
    total = sum(array.nbytes for array in arrays.values())
    assert places[-1] + array.nbytes - places[0] < total + 64 * len(specs)
