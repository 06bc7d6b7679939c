"""JSON and TOML: what Python reads is read, but for depths and numbers that nothing can use."""

import json

import pytest

from gap_runtime.errors import InputError
from gap_runtime.records.plain import DEEPEST, LONGEST_INTEGER, parse_json, read_table, read_toml

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**39), 10**39) | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@hypothesis.given(value=PLAIN)
def test_what_was_written_is_read(value):
    assert parse_json(json.dumps(value), "x", InputError) == value
    assert parse_json(json.dumps(value).encode(), "x", InputError) == value


@hypothesis.given(data=st.binary(max_size=50) | st.text(max_size=50))
def test_anything_else_is_one_line(data):
    said = ""
    try:
        parse_json(data, "x", InputError, "do this")
    except InputError as error:
        said = str(error)
    assert said == "" or (said.startswith("x: not valid JSON (") and said.endswith("; do this"))


@pytest.mark.parametrize("mark", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [DEEPEST, DEEPEST + 1, 500, 100_000])
def test_depth(mark, depth):
    end = {"[": "]", '{"a":': "}"}[mark]
    whole = mark * depth + ("" if mark == "[" else "1") + end * depth
    if depth <= DEEPEST:
        parse_json(whole, "x", InputError)
        return
    for text in (whole, mark * depth):
        with pytest.raises(InputError, match="not valid JSON"):
            parse_json(text, "x", InputError)
    with pytest.raises(InputError, match="nested over 64 deep"):
        parse_json(whole, "x", InputError)


@pytest.mark.parametrize("digits", [1, LONGEST_INTEGER, LONGEST_INTEGER + 1, 400, 5000])
def test_long_integers(digits):
    text = '{"a": [' + "7" * digits + "]}"
    if digits <= LONGEST_INTEGER:
        assert parse_json(text, "x", InputError) == {"a": [int("7" * digits)]}
    else:
        with pytest.raises(InputError, match=f"an integer of {digits} digits"):
            parse_json(text, "x", InputError)


@pytest.mark.parametrize("before", range(5))
def test_a_long_integer_is_found_wherever_it_begins(before):
    for sign in ("", "-"):
        text = " " * before + sign + "7" * LONGEST_INTEGER
        assert parse_json(text, "x", InputError) == int(text)
        with pytest.raises(InputError, match=f"an integer of {LONGEST_INTEGER + 1} digits"):
            parse_json(f"{text}7", "x", InputError)


def test_digits_in_a_text_are_no_number():
    assert parse_json(json.dumps(["7" * 400]), "x", InputError) == ["7" * 400]


def test_files_of_tables(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.json: not a JSON object"):
        read_table(path, InputError)
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_table(path, InputError) == {"a": 1}


LONG = ("7" * 41, "7" * 5000, "1_" * 41 + "1", "0x" + "f" * 40)


@pytest.mark.parametrize(
    "text",
    [
        *("a = ", "a = 1\na = 2", "\xff", "x = " + "[" * 100 + "]" * 100, "x = " + "[" * 9000),
        *(f"x = [{{y = {digits}}}]" for digits in LONG),
    ],
)
def test_toml(tmp_path, text):
    path = tmp_path / "x.toml"
    path.write_text('a = "b"', encoding="utf-8")
    assert read_toml(path, InputError) == {"a": "b"}
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"x\.toml: not "):
        read_toml(path, InputError)
