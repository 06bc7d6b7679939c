"""Where a record's picture is looked for."""

import pytest

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import find_picture


def test_a_picture_whose_name_no_system_takes_is_found_nowhere(tmp_path):
    """Where names are looked for, too: by their end alone, in a folder."""
    for name in ("x" * 5000, "a/" + "y" * 5000, "\ud800.png"):
        found = find_picture(name, tmp_path, "line 1", turned=False, flat=True)
        with pytest.raises(InputError):
            found.load()
