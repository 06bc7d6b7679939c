"""Plain data to frozen dataclasses and back."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pytest

from gap_runtime.errors import ConfigError, RecordError
from gap_runtime.records import dump_record, load_record


class Point(NamedTuple):
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Wheel:
    size: int
    pressure: float = 2.5


@dataclass(frozen=True, kw_only=True)
class Car:
    name: str
    fast: bool
    weight: float
    wheels: tuple[Wheel, ...]
    spot: tuple[int, float]
    owner: str | None
    dims: tuple[int | str, ...]
    labels: dict[str, int]
    spare: Wheel | None = None
    fuel: Literal["petrol", "diesel", "none"] = "petrol"
    gear: Literal["manual", "automatic"] | None = None
    ends: tuple[Point, ...] = ()


def plain(**changes):
    data = {
        "name": "beetle",
        "fast": False,
        "weight": 0.8,
        "wheels": [{"size": 15, "pressure": 1.5}, {"size": 16}],
        "spot": [3, 4.5],
        "owner": None,
        "dims": [1, "S", 64],
        "labels": {"door": 2},
    }
    return {**data, **changes}


def refusal(data):
    with pytest.raises(RecordError) as caught:
        load_record(Car, data, "car.json")
    return str(caught.value)


def test_every_field_is_converted():
    assert load_record(Car, plain(), "car.json") == Car(
        name="beetle",
        fast=False,
        weight=0.8,
        wheels=(Wheel(size=15, pressure=1.5), Wheel(size=16, pressure=2.5)),
        spot=(3, 4.5),
        owner=None,
        dims=(1, "S", 64),
        labels={"door": 2},
        spare=None,
    )


def test_unknown_key_is_refused_with_the_known_ones():
    assert refusal(plain(colour="red")) == (
        "car.json: unknown key 'colour'; have name, fast, weight, wheels, spot, owner, dims, "
        "labels, spare, fuel, gear, ends"
    )


def test_missing_key_is_refused():
    data = plain()
    del data["weight"]
    assert refusal(data) == "car.json: key 'weight' is missing"


def test_optional_key_without_default_must_be_there():
    data = plain()
    del data["owner"]
    assert refusal(data) == "car.json: key 'owner' is missing"


@pytest.mark.parametrize("data", [None, [], "name", 3])
def test_a_record_must_be_a_table(data):
    with pytest.raises(RecordError, match=r"car\.json: found .*, expected a table"):
        load_record(Car, data, "car.json")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("name", 3, "car.json: name: found 3 (int), expected str"),
        ("name", None, "car.json: name: found None (NoneType), expected str"),
        ("fast", 1, "car.json: fast: found 1 (int), expected bool"),
        ("weight", True, "car.json: weight: found True (bool), expected float"),
        ("weight", "0.8", "car.json: weight: found '0.8' (str), expected float"),
        ("owner", 7, "car.json: owner: found 7 (int), expected str"),
        ("wheels", {"size": 15}, "car.json: wheels: found {'size': 15} (dict), expected a list"),
        ("spot", [1], "car.json: spot: found 1 values, expected 2"),
        ("spot", [1, 2, 3], "car.json: spot: found 3 values, expected 2"),
        ("spot", [1.5, 2], "car.json: spot[0]: found 1.5 (float), expected int"),
        ("dims", [1, 2.5], "car.json: dims[1]: found 2.5 (float), expected int or str"),
        ("dims", [True], "car.json: dims[0]: found True (bool), expected int or str"),
        ("labels", [1], "car.json: labels: found [1] (list), expected a table"),
        ("labels", {"door": "two"}, "car.json: labels.door: found 'two' (str), expected int"),
        ("spare", {"size": True}, "car.json: spare.size: found True (bool), expected int"),
    ],
)
def test_wrong_type_is_refused_with_its_path(key, value, line):
    assert refusal(plain(**{key: value})) == line


@pytest.mark.parametrize(
    ("wheel", "line"),
    [
        ({"size": "big"}, "car.json: wheels[1].size: found 'big' (str), expected int"),
        ({"size": True}, "car.json: wheels[1].size: found True (bool), expected int"),
        ({"size": 15.0}, "car.json: wheels[1].size: found 15.0 (float), expected int"),
        ({}, "car.json: key 'wheels[1].size' is missing"),
        ({"size": 1, "hub": 2}, "car.json: unknown key 'wheels[1].hub'; have size, pressure"),
    ],
)
def test_the_path_reaches_into_nested_records(wheel, line):
    assert refusal(plain(wheels=[{"size": 15}, wheel])) == line


@pytest.mark.parametrize("fuel", ["petrol", "diesel", "none"])
def test_a_word_among_those_that_there_are(fuel):
    assert load_record(Car, plain(fuel=fuel), "car.json").fuel == fuel


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"fuel": "deisel"},
            "car.json: fuel 'deisel' is unknown; did you mean diesel? have petrol, diesel, none",
        ),
        ({"fuel": "x"}, "car.json: fuel 'x' is unknown; have petrol, diesel, none"),
        ({"fuel": None}, "car.json: fuel: found None (NoneType), expected one of petrol, diesel"),
        ({"fuel": True}, "car.json: fuel: found True (bool), expected one of petrol, diesel"),
        ({"gear": "manuel"}, "car.json: gear 'manuel' is unknown; did you mean manual? have"),
        ({"gear": 3}, "car.json: gear: found 3 (int), expected one of manual, automatic"),
    ],
)
def test_any_other_word_is_refused(changes, line):
    assert refusal(plain(**changes)).startswith(line)


def test_a_near_key_is_suggested():
    assert "unknown key 'weigth'; did you mean weight? have name" in refusal(plain(weigth=1.0))


def test_a_named_tuple_is_a_list():
    data = plain(ends=[[0, 1.5], [2, 3]])
    ends = load_record(Car, data, "car.json").ends
    assert ends == (Point(0.0, 1.5), Point(2.0, 3.0))
    assert all(type(value) is float for end in ends for value in end)
    assert dump_record(ends) == data["ends"]
    assert refusal(plain(ends=[[0, 1, 2]])) == "car.json: ends[0]: found 3 values, expected 2"
    assert "ends[1][0]: found 'x'" in refusal(plain(ends=[[0, 1], ["x", 1]]))


def test_an_integer_is_a_float():
    weight = load_record(Car, plain(weight=1), "car.json").weight
    assert weight == 1
    assert type(weight) is float


def test_long_values_are_cut_in_the_message():
    assert len(refusal(plain(weight="x" * 10_000))) < 150


def test_records_survive_json():
    car = load_record(Car, plain(spare={"size": 14}, owner="Ada"), "car.json")
    assert load_record(Car, json.loads(json.dumps(dump_record(car))), "again") == car


def test_dump_gives_lists_and_plain_dicts():
    assert dump_record(load_record(Car, plain(), "car.json")) == {
        **plain(),
        "wheels": [{"size": 15, "pressure": 1.5}, {"size": 16, "pressure": 2.5}],
        "spare": None,
        "fuel": "petrol",
        "gear": None,
        "ends": [],
    }


def test_loading_leaves_the_data_alone():
    data = plain()
    load_record(Car, data, "car.json")
    assert data == plain()


def test_a_record_error_is_a_config_error():
    assert issubclass(RecordError, ConfigError)
    assert RecordError.exit_code == 2


def test_the_manifest_survives_the_round_trip(manifest):
    text = json.dumps(dump_record(manifest))
    assert load_record(type(manifest), json.loads(text), "manifest.json") == manifest
    assert [field.name for field in dataclasses.fields(manifest)] == list(json.loads(text))
