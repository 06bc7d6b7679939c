"""The proof of graphs: a clean one passes, every planted defect is found."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gap_export.dialects import native, portable
from gap_export.errors import GraphError, StaticShapeError, UnsupportedOpError
from gap_export.tracing.proof import prove_graph
from gap_runtime.bundle.tensors import TensorSpec

FLOAT = TensorProto.FLOAT
WIDTH = 4


def spec(name, shape, dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape, meaning="")


IN, OUT = spec("x", (1, WIDTH)), spec("y", (1, WIDTH))


def external_weight(folder, *, location="w.bin", offset=0, size=None, length=WIDTH * WIDTH * 4):
    """A weight [4, 4] in a file of `size` bytes; `size` of -1 makes no file."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[WIDTH, WIDTH])
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": offset, "length": length}
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    size = WIDTH * WIDTH * 4 + offset if size is None else size
    if size >= 0:
        path = folder / location
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.zeros(size, np.uint8).tobytes())
    return tensor


def values(*specs):
    return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in specs]


def save(folder, nodes, *, weights=(), inputs=None, outputs=None, inner=(), opsets=None):
    """A graph file x -> y with shapes inferred, as the exporter would leave it."""
    graph = helper.make_graph(
        nodes,
        "g",
        values(*(inputs or [("x", FLOAT, [1, WIDTH])])),
        values(*(outputs or [("y", FLOAT, [1, WIDTH])])),
        list(weights),
        value_info=values(*inner),
    )
    imports = [helper.make_opsetid(*pair) for pair in (opsets or [("", 24)])]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    path = folder / "g.onnx"
    onnx.save(model, path)
    return path


def clean(folder, **changes):
    """x -> Gemm with an external weight -> Sigmoid -> y."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], "gemm", transB=1),
        helper.make_node("Sigmoid", ["h"], ["y"], "sigmoid"),
    ]
    weights = changes.pop("weights", None) or [external_weight(folder)]
    inner = changes.pop("inner", [("h", FLOAT, [1, WIDTH])])
    return save(folder, nodes, weights=weights, inner=inner, **changes)


def one_node(folder, operator, inputs=("x",), outputs=("y",), **more):
    options = {k: more.pop(k) for k in ("weights", "inner", "opsets") if k in more}
    options |= {
        f"{k}puts": more.pop(f"graph_{k}puts") for k in ("in", "out") if f"graph_{k}puts" in more
    }
    node = helper.make_node(operator, list(inputs), list(outputs), "node", **more)
    return save(folder, [node], **options)


def prove(
    path, inputs=(IN,), outputs=(OUT,), opset=24, free=frozenset(), operators=native.OPERATORS
):
    prove_graph(path, inputs=inputs, outputs=outputs, opset=opset, operators=operators, free=free)


def refusal(kind, path, **promise):
    with pytest.raises((GraphError, StaticShapeError, UnsupportedOpError)) as caught:
        prove(path, **promise)
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert message.startswith("g.onnx: ")
    assert "\n" not in message
    return message


def test_a_clean_graph_passes(tmp_path):
    prove(clean(tmp_path))


def test_a_promised_free_dimension_passes_and_others_do_not(tmp_path):
    path = clean(
        tmp_path,
        inputs=[("x", FLOAT, ["rows", WIDTH])],
        outputs=[("y", FLOAT, ["rows", WIDTH])],
        inner=[("h", FLOAT, ["rows", WIDTH])],
    )
    promise = {"inputs": [spec("x", ("rows", WIDTH))], "outputs": [spec("y", ("rows", WIDTH))]}
    prove(path, free=frozenset({"rows"}), **promise)
    refusal(StaticShapeError, path, free=frozenset({"columns"}), **promise)
    refusal(StaticShapeError, path, **promise)


@pytest.mark.parametrize("size", ["n", None])
def test_an_open_dimension_inside(tmp_path, size):
    message = refusal(StaticShapeError, clean(tmp_path, inner=[("h", FLOAT, [size, WIDTH])]))
    assert "'h'" in message
    assert "dimension 0" in message


def test_a_tensor_without_a_shape(tmp_path):
    assert "'h'" in refusal(StaticShapeError, clean(tmp_path, inner=[]))


def test_an_open_dimension_at_the_border(tmp_path):
    path = clean(tmp_path, outputs=[("y", FLOAT, ["n", WIDTH])])
    refusal(GraphError, path)


@pytest.mark.parametrize("operator", ["NonZero", "Compress", "Unique", "RandomUniformLike"])
def test_an_operator_off_the_list(tmp_path, operator):
    message = refusal(UnsupportedOpError, one_node(tmp_path, operator))
    assert operator in message


def branch(name):
    node = helper.make_node("Identity", ["x"], [f"{name}_y"])
    return helper.make_graph([node], name, [], values((f"{name}_y", FLOAT, [1, WIDTH])))


def test_an_if(tmp_path):
    condition = numpy_helper.from_array(np.array(True), "c")  # noqa: FBT003 - a value
    path = one_node(
        tmp_path,
        "If",
        ["c"],
        weights=[condition],
        then_branch=branch("then"),
        else_branch=branch("else"),
    )
    assert "If" in refusal(UnsupportedOpError, path)


def test_a_loop(tmp_path):
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["state"], ["state_on"]),
        ],
        "body",
        values(("k", TensorProto.INT64, []), ("go", TensorProto.BOOL, []))
        + values(("state", FLOAT, [1, WIDTH])),
        values(("go_on", TensorProto.BOOL, []), ("state_on", FLOAT, [1, WIDTH])),
    )
    times = numpy_helper.from_array(np.array(3), "times")
    path = one_node(tmp_path, "Loop", ["times", "", "x"], weights=[times], body=body)
    assert "Loop" in refusal(UnsupportedOpError, path)


@pytest.mark.parametrize("declared", [True, False])
def test_a_custom_domain(tmp_path, declared):
    opsets = [("", 24), ("com.example", 1)] if declared else [("", 24)]
    path = one_node(tmp_path, "Sigmoid", domain="com.example", opsets=opsets)
    assert "com.example" in refusal(UnsupportedOpError, path)


def test_a_function_of_the_models_own(tmp_path):
    path = one_node(tmp_path, "Twice", domain="mine", opsets=[("", 24), ("mine", 1)])
    model = onnx.load(path)
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(
        helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 24)])
    )
    onnx.save(model, path)
    refusal(UnsupportedOpError, path)


@pytest.mark.parametrize("dialect", [native, portable])
def test_no_control_flow_or_data_dependent_shape_is_on_the_list(dialect):
    assert not dialect.OPERATORS & {
        *("If", "Loop", "Scan", "SequenceMap", "NonZero", "Compress", "Unique"),
        *("RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "NonMaxSuppression"),
    }
    assert {"RMSNormalization", "RotaryEmbedding", "TensorScatter", "Attention", "TopK"} <= (
        native.OPERATORS
    )
    assert not portable.OPERATORS & {
        *("RMSNormalization", "RotaryEmbedding", "TensorScatter", "Attention", "Swish"),
    }


def test_an_operator_of_another_dialect(tmp_path):
    path = one_node(tmp_path, "Swish")
    prove(path)
    with pytest.raises(UnsupportedOpError, match="Swish"):
        prove(path, operators=portable.OPERATORS)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ([spec("pixels", (1, WIDTH))], "pixels"),
        ([spec("x", (1, WIDTH), "float16")], "float16"),
        ([spec("x", (1, WIDTH + 1))], "5"),
        ([spec("x", (WIDTH,))], "(4,)"),
        ([spec("x", ("rows", WIDTH))], "rows"),
        ([IN, spec("z", (1,))], "2"),
        ([], "0"),
    ],
)
def test_an_input_that_was_promised_otherwise(tmp_path, inputs, found):
    message = refusal(GraphError, clean(tmp_path), inputs=inputs)
    assert "input" in message
    assert found in message


@pytest.mark.parametrize(
    "outputs", [[spec("z", (1, WIDTH))], [spec("y", (1, WIDTH), "int64")], [OUT, OUT], []]
)
def test_an_output_that_was_promised_otherwise(tmp_path, outputs):
    assert "output" in refusal(GraphError, clean(tmp_path), outputs=outputs)


def test_inputs_in_another_order(tmp_path):
    path = one_node(
        tmp_path, "Add", ["a", "b"], graph_inputs=[("a", FLOAT, [WIDTH]), ("b", FLOAT, [WIDTH])]
    )
    refusal(GraphError, path, inputs=[spec("b", (WIDTH,)), spec("a", (WIDTH,))])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16"), (FLOAT, "float32")],
)
def test_dtypes_by_name(tmp_path, kind, dtype):
    path = one_node(
        tmp_path, "Identity", graph_inputs=[("x", kind, [2])], graph_outputs=[("y", kind, [2])]
    )
    prove(path, inputs=[spec("x", (2,), dtype)], outputs=[spec("y", (2,), dtype)])
    other = "float32" if dtype != "float32" else "bfloat16"
    refusal(GraphError, path, inputs=[spec("x", (2,), other)], outputs=[spec("y", (2,), dtype)])


def top_k(folder, count_node, weights):
    nodes = [*count_node, helper.make_node("TopK", ["x", "k"], ["y", "i"], "top")]
    inner = [("i", TensorProto.INT64, [1, 2]), ("k", TensorProto.INT64, [1])]
    return save(folder, nodes, weights=weights, inner=inner, outputs=[("y", FLOAT, [1, 2])])


def test_a_constant_topk_size_passes(tmp_path):
    path = top_k(tmp_path, [], [numpy_helper.from_array(np.array([2]), "k")])
    prove(path, outputs=[spec("y", (1, 2))])


def test_a_computed_topk_size(tmp_path):
    node = helper.make_node("Shape", ["x"], ["k"], start=0, end=1)
    path = top_k(tmp_path, [node], [])
    message = refusal(StaticShapeError, path, outputs=[spec("y", (1, 2))])
    assert "TopK" in message
    assert "'top'" in message


@pytest.mark.parametrize("rows", [1, "rows"])
@pytest.mark.parametrize(("shape", "fits"), [([2, 2], True), ([2, 3], False), ([1], False)])
def test_a_reshape_to_another_count(tmp_path, rows, shape, fits):
    """A free dimension may be anything."""
    path = one_node(
        tmp_path,
        "Reshape",
        ["x", "shape"],
        weights=[numpy_helper.from_array(np.array(shape), "shape")],
        graph_inputs=[("x", FLOAT, [rows, WIDTH])],
        graph_outputs=[("y", FLOAT, shape)],
    )
    promise = {"inputs": [spec("x", (rows, WIDTH))], "outputs": [spec("y", tuple(shape))]}
    if fits or rows == "rows":
        prove(path, **promise)
    else:
        assert f"Reshape of [1, 4] to {shape}" in refusal(GraphError, path, **promise)


@pytest.mark.parametrize("opset", [23, 25])
def test_another_opset(tmp_path, opset):
    message = refusal(GraphError, clean(tmp_path), opset=opset)
    assert "24" in message
    assert str(opset) in message


@pytest.mark.parametrize("location", ["../w.bin", "sub/w.bin"])
def test_weights_outside_the_folder(tmp_path, location):
    home = tmp_path / "bundle"
    home.mkdir()
    path = clean(home, weights=[external_weight(home, location=location)])
    message = refusal(GraphError, path)
    assert location in message
    assert "'w'" in message


def test_weights_at_an_absolute_path(tmp_path):
    weight = external_weight(tmp_path, location=str(tmp_path / "w.bin"))
    refusal(GraphError, clean(tmp_path, weights=[weight]))


def test_weights_in_a_file_that_is_not_there(tmp_path):
    message = refusal(GraphError, clean(tmp_path, weights=[external_weight(tmp_path, size=-1)]))
    assert "w.bin" in message


@pytest.mark.parametrize("length", [64, None])
@pytest.mark.parametrize("offset", [0, 4096])
def test_weights_past_the_end_of_their_file(tmp_path, offset, length):
    weight = external_weight(tmp_path, offset=offset, size=offset + 63, length=length)
    message = refusal(GraphError, clean(tmp_path, weights=[weight]))
    assert "'w'" in message
    assert "w.bin" in message


@pytest.mark.parametrize("length", [60, 68])
def test_a_length_that_is_not_the_tensors(tmp_path, length):
    weight = external_weight(tmp_path, length=length, size=200)
    assert "'w'" in refusal(GraphError, clean(tmp_path, weights=[weight]))


def test_what_the_onnx_checker_finds(tmp_path):
    # Gemm's weight has the wrong inner size: only full shape inference sees it.
    wrong = numpy_helper.from_array(np.zeros((WIDTH, WIDTH + 1), np.float32), "w")
    message = refusal(GraphError, clean(tmp_path, weights=[wrong]))
    assert "ONNX checker" in message


def test_what_the_onnx_checker_knows_of_attributes(tmp_path):
    message = refusal(GraphError, one_node(tmp_path, "Softmax", axis="last"))
    assert "ONNX checker" in message


def test_a_wrong_output_shape_is_found(tmp_path):
    path = clean(tmp_path, outputs=[("y", FLOAT, [1, WIDTH + 1])])
    refusal(GraphError, path, outputs=[spec("y", (1, WIDTH + 1))])
