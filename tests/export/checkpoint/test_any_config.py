"""Any value in a checkpoint's config.json ends in a plan of the model, or in one line."""

import json
import shutil

import pytest

from gap_export.errors import ExportError
from gap_export.pipeline.model import read_model
from gap_export.pipeline.request import make_request
from gap_runtime.errors import ConfigError

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

ODD = st.sampled_from(
    (
        *(
            None,
            True,
            0,
            -1,
            1,
            2,
            7,
            2**31,
            2**63,
            10**30,
            0.5,
            -0.0,
            1e308,
            "",
            "x",
            "0",
            "gelu",
        ),
        *("a\nb", "\x1b[2J", "\ud800", "float16", [], {}, [0], [[1, 2]], {"a": 1}, [1.0] * 4),
    )
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NEW = ("rope_scaling", "quantization_config", "rope_theta", "head_dim", "sliding_window")
"""Keys that the tiny checkpoint does not have, and others do."""


@pytest.fixture(scope="module")
def folder(tiny_llava, tmp_path_factory):
    """A copy whose config.json may be changed."""
    return shutil.copytree(tiny_llava, tmp_path_factory.mktemp("any") / "model")


def list_places(table, here=()):
    """Places of values in tables, and of some that are not there."""
    for key, value in [*table.items(), *((key, None) for key in NEW)]:
        yield (*here, key)
        if isinstance(value, dict):
            yield from list_places(value, (*here, key))


@hypothesis.settings(
    max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(drawn=st.data())
def test_a_config_is_read_or_refused_in_a_line(folder, tiny_llava, drawn):
    data = json.loads((tiny_llava / "config.json").read_text("utf-8"))
    *path, last = drawn.draw(st.sampled_from(list(list_places(data))))
    table = data
    for key in path:
        table = table[key]
    table[last] = drawn.draw(ODD | PLAIN)
    (folder / "config.json").write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))
    request = make_request(
        folder, settings={"prompt.template": "<image> {phrase}"}, out=folder.parent / "out"
    )
    try:
        spec = read_model(request.named).spec
    except (ExportError, ConfigError) as error:
        said = str(error)
        assert said.isprintable()
        assert 0 < len(said) < 2000
    else:
        # What it says of sizes is taken as it is; what it does not say has the library's value.
        found, text = spec.decoder, data["text_config"]
        assert found.width == text.get("hidden_size", found.width)
        assert found.layers == text.get("num_hidden_layers", found.layers)
        assert found.max_positions == text.get("max_position_embeddings", found.max_positions)
        assert isinstance(found.width, int)
