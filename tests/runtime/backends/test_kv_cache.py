"""The cache of a decoder session, against a list of what was written."""

import numpy as np
import pytest

from gap_runtime.backends._kv_cache import KvCache, cache_specs
from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.manifest import DECODER


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
