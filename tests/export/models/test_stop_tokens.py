"""Tokens that end an answer, as configs and generation configs have them."""

import json

import pytest
from makers.damage import change_json
from tools.refusals import refuse

from gap_export.errors import CheckpointError

FAMILIES = ("llava", "llava-original", "llava-next-mistral", "minigpt-v2", "internvl3")
NONE = object()


def write(case, role, generation, configured=NONE):
    """Set the tokens of the generation config and, of the authors' layout, of the config."""
    folder = case.place(role)
    path = folder / "generation_config.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    data = {key: value for key, value in data.items() if key != "eos_token_id"}
    if generation is not NONE:
        data["eos_token_id"] = generation
    path.write_text(json.dumps(data), encoding="utf-8")
    if configured is not NONE:
        change_json(folder / "config.json", eos_token_id=configured)


def role_of(name):
    return "language" if name == "minigpt-v2" else ""


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("value", "stops"),
    [
        (7, (7,)),
        ([2, 9], (2, 9)),
        ([9, 2, 9], (9, 2)),
        # One that was added to the tokenizer and not to the table, and what is no token at all.
        ([2, 32007, -1], (2,)),
    ],
)
def test_tokens_that_can_come(find, tmp_path, name, value, stops):
    case = find(name).copy(tmp_path / "home")
    write(case, role_of(name), value)
    assert case.plan(tmp_path / "b").spec.stop_ids == stops


@pytest.mark.parametrize("value", [NONE, None])
def test_the_config_has_a_word_where_the_generation_config_has_none(find, tmp_path, value):
    case = find("llava-original").copy(tmp_path / "home")
    write(case, "", value, configured=[5, 6])
    assert case.plan(tmp_path / "b").spec.stop_ids == (5, 6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [-1, 32007, [-1, 32007]])
def test_tokens_that_can_never_come(find, tmp_path, name, value):
    case = find(name).copy(tmp_path / "home")
    write(case, role_of(name), value)
    message = refuse(case, tmp_path / "b", CheckpointError)
    where = case.place(role_of(name)) / "generation_config.json"
    assert message.startswith(f"{where}: eos_token_id {value!r}, which the model can never answer")
    assert "; give the number that the tokenizer has for its end of sentence" in message


@pytest.mark.parametrize("name", ["llava", "minigpt-v2"])
@pytest.mark.parametrize("value", ["</s>", "2", [], [[2]], [2, "</s>"], 2.0, True, {}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_values_that_are_no_tokens(find, tmp_path, name, value, file):
    case = find(name).copy(tmp_path / "home")
    path = case.place(role_of(name)) / file
    if not path.is_file():
        path.write_text("{}", encoding="utf-8")
    change_json(path, eos_token_id=value)
    message = refuse(case, tmp_path / "b", CheckpointError)
    assert message == (
        f"{path}: eos_token_id is {value!r}, expected the number of a token, or a list of "
        "several; download the checkpoint again, or mend the value"
    )
