"""Two references of one model, compared as far as a processor's arithmetic allows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from gap_runtime.bundle.manifest import ReferenceSample

# The order of a sum depends on where its numbers lie in memory on some processors (seen on an AMD
# EPYC), so the same weights read in two ways give the same values but for their last bits.
SAME = {"rtol": 1e-4, "atol": 1e-5}


def require_same_references(
    found: tuple[Sequence[ReferenceSample], Mapping[str, np.ndarray]],
    truth: tuple[Sequence[ReferenceSample], Mapping[str, np.ndarray]],
) -> None:
    """The same answers, tokens, boxes and kept patches; floats but for the last bits."""
    for one, other in zip(found[0], truth[0], strict=True):
        assert replace(one, token_margins=()) == replace(other, token_margins=())
        assert one.token_margins == pytest.approx(other.token_margins, rel=1e-3, abs=1e-5)
    assert found[1].keys() == truth[1].keys()
    for name, array in truth[1].items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[1][name], array, **SAME, err_msg=name)
        else:
            np.testing.assert_array_equal(found[1][name], array, err_msg=name)
