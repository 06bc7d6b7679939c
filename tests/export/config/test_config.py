"""Configuration: shipped files, names, overrides and what is refused."""

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from tools.places import ROOT

from gap_export.checkpoint.index import open_checkpoint
from gap_export.cli.options import add_export_arguments, read_config
from gap_export.config import shipped
from gap_export.config.counts import count_ratios
from gap_export.config.load import load_config, parse_override
from gap_export.config.records import DTYPES, PruneConfig
from gap_export.config.shipped import list_configs
from gap_export.errors import CheckpointError
from gap_runtime.errors import ConfigError, RecordError, UnknownNameError
from gap_runtime.machines.target import load_target
from gap_runtime.registry import list_plugins

MODELS = sorted(path.stem for path in (ROOT / "export_configs").glob("*.toml"))
TARGETS = sorted(path.stem for path in (ROOT / "export_configs" / "targets").glob("*.toml"))


@pytest.fixture
def toml(tmp_path):
    """A function that writes a model file."""

    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(model, **overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(str(model), {key.replace("__", "."): v for key, v in overrides.items()})
    message = str(caught.value)
    assert "\n" not in message
    return message


def request_for(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--checkpoint")
    add_export_arguments(parser)
    options = parser.parse_args(list(arguments))
    return read_config(options).config


def family_templates(family):
    """What a family asks where its configuration has no template."""
    found = vars(importlib.import_module(f"gap_export.models.{family}")).items()
    values = [value for name, value in found if "TEMPLATE" in name]
    texts = [text for v in values for text in (v.values() if isinstance(v, dict) else [v])]
    # One of several facts that a family's published checkpoints share.
    facts = [getattr(value, "template", None) for _, value in found]
    return texts + [text for text in facts if isinstance(text, str)]


def test_the_shipped_files_are_listed():
    assert {"refshapes", "llava-1.5-7b", "llava-1.5-13b"} <= set(MODELS)
    assert list_configs() == MODELS
    assert "cpu" in TARGETS


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_model_file_loads(name):
    named = load_config(name, {})
    assert named.name == name
    assert (ROOT / "gap_export" / "models" / f"{named.config.family}.py").is_file()
    template = named.config.prompt.template
    templates = family_templates(named.config.family) if template is None else [template]
    assert templates
    for each in templates:
        assert each.count("<image>") == each.count("{phrase}") == 1
        assert each.index("<image>") < each.index("{phrase}")


@pytest.mark.parametrize("name", TARGETS)
def test_every_shipped_target_loads(name):
    target = load_target(name)
    dialect = importlib.import_module(f"gap_export.dialects.{target.dialect}")
    assert target.opset in dialect.OPSETS
    assert target.backend in list_plugins("gap_runtime.backends")
    assert target.packages or target.backend == "onnxruntime"
    assert all(SpecifierSet(versions) for versions in target.packages.values())
    assert target.dtype is None or target.dtype in DTYPES


def test_defaults(toml):
    config = load_config(str(toml('family = "llava"\ncheckpoint = "a/b"')), {}).config
    assert config.prune == PruneConfig(
        strategy="cls_attention",
        ratios=(0.5,),
        positions="gap",
        seed=0,
        extra_token="last-visual",
        phrase=None,
    )
    assert (config.dtype, config.revision, config.parts) == (None, None, {})
    assert config.image.canvas is None
    assert (config.vision.heads, config.vision.side) == (None, None)
    assert config.box.frame is None


def test_a_wrong_model_name_lists_near_matches():
    with pytest.raises(UnknownNameError) as caught:
        load_config("lava-1.5-7b", {})
    message = str(caught.value)
    assert "lava-1.5-7b" in message
    assert "did you mean llava-1.5-7b" in message
    assert "refshapes" in message
    assert "folder" in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_path_that_is_no_folder(model):
    assert refusal(model) == f"{model}: no such folder"


def test_a_toml_that_does_not_exist():
    assert refusal("nowhere.toml") == "nowhere.toml: no such configuration file"


def test_a_broken_toml_names_the_file(toml):
    path = toml("family = llava")
    assert str(path) in refusal(path)


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, -1e-9, float("nan"), float("inf")])
def test_ratios_outside_the_range(ratio):
    with pytest.raises(ConfigError, match=r"outside \[0, 1\)"):
        count_ratios(PruneConfig(ratios=(ratio,)), 64)
    # What is no number at all is refused before it is a ratio.
    with pytest.raises(ConfigError, match=r"outside \[0, 1\)|expected a finite number"):
        load_config("refshapes", {"prune.ratios": [float(ratio)]})


def test_a_ratio_that_leaves_nothing():
    with pytest.raises(ConfigError, match="leaves none of 64"):
        count_ratios(PruneConfig(ratios=(0.999,)), 64)


def test_two_ratios_with_one_count():
    with pytest.raises(ConfigError, match=r"0.5 and 0.501 both keep 32 of 64"):
        count_ratios(PruneConfig(ratios=(0.25, 0.5, 0.501)), 64)


def test_counts_are_rounded_half_up_and_keep_their_order():
    config = PruneConfig(ratios=(0.9, 0, 0.5, 0.75))
    assert count_ratios(config, 25) == [(0.9, 3), (0, 25), (0.5, 13), (0.75, 6)]
    assert count_ratios(PruneConfig(ratios=(0.5, 0.75, 0.9)), 576) == [
        (0.5, 288),
        (0.75, 144),
        (0.9, 58),
    ]
    # In binary, 5 * (1 - 0.9) is a hair below one half.
    assert count_ratios(PruneConfig(ratios=(0.9,)), 5) == [(0.9, 1)]


def test_tokens_that_stay_are_part_of_the_count():
    """The last of 25 mark the ends of rows: a ratio that leaves only them keeps no patch."""
    assert count_ratios(PruneConfig(ratios=(0.75, 0.8)), 25, 4) == [(0.75, 6), (0.8, 5)]
    with pytest.raises(ConfigError, match=r"ratio 0.84 keeps 4 of 25.* of which 4 mark") as caught:
        count_ratios(PruneConfig(ratios=(0.84,)), 25, 4)
    advised = float(re.search(r"use at most ([\d.]+)$", str(caught.value))[1])
    assert count_ratios(PruneConfig(ratios=(advised,)), 25, 4) == [(advised, 5)]


def test_unknown_pruner():
    message = refusal("refshapes", prune__strategy="cls_atention")
    assert "cls_atention" in message
    assert "did you mean cls_attention" in message
    assert "spatial" in message


def test_unknown_positions():
    message = refusal("refshapes", prune__positions="shifted")
    for part in ("refshapes.toml", "prune.positions", "shifted", "gap, compact, permuted"):
        assert part in message


def test_unknown_dtype():
    message = refusal("refshapes", dtype="int8")
    for part in ("refshapes.toml", "dtype", "int8", "float32, float16, bfloat16"):
        assert part in message


def test_unknown_rule_for_the_extra_token():
    message = refusal("refshapes", prune__extra_token="first")
    for part in ("refshapes.toml", "prune.extra_token", "first", "last-visual, append, centroid"):
        assert part in message


def test_unknown_source_of_phrases():
    message = refusal("refshapes", prune__phrase="words")
    for part in ("refshapes.toml", "prune.phrase", "words", "clip, embeddings"):
        assert part in message


def test_unknown_frame_of_boxes():
    message = refusal("refshapes", box__frame="square")
    for part in ("refshapes.toml", "box.frame", "square", "padded-square, original"):
        assert part in message


@pytest.mark.parametrize("frame", ["padded-square", "original"])
def test_frames_of_boxes(frame):
    assert load_config("refshapes", {"box.frame": frame}).config.box.frame == frame


@pytest.mark.parametrize("rule", ["last-visual", "append", "centroid", "drop"])
def test_rules_for_the_extra_token(rule):
    assert load_config("refshapes", {"prune.extra_token": rule}).config.prune.extra_token == rule


@pytest.mark.parametrize("source", ["clip", "embeddings"])
def test_sources_of_phrases(source):
    assert load_config("refshapes", {"prune.phrase": source}).config.prune.phrase == source


def test_unknown_target():
    with pytest.raises(UnknownNameError, match=r"unknown target 'cppu'; did you mean cpu"):
        load_target("cppu")


@pytest.mark.parametrize("name", ["../llava-1.5-7b", "..", "/etc/passwd"])
def test_a_target_is_a_name_not_a_path(name):
    with pytest.raises(ConfigError):
        load_target(name)


def test_unknown_set_key():
    message = refusal("refshapes", prune__rato=0.5)
    assert message == (
        "refshapes.toml: unknown key 'prune.rato'; "
        "did you mean ratios or extra_token or strategy? have strategy, ratios, keep, positions, "
        "seed, ivc, extra_token, phrase"
    )
    assert "unknown key 'prun'" in refusal("refshapes", prun__ratios=[0.5])


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("prompt__answer", "many", ("prompt.answer", "'many' (str)", "expected int")),
        ("prompt__answer", True, ("prompt.answer", "True (bool)", "expected int")),
        ("prompt__answer", 2.5, ("prompt.answer", "2.5 (float)", "expected int")),
        ("prune__ratios", "half", ("prune.ratios", "'half' (str)", "expected a list")),
        ("prune__ratios", True, ("prune.ratios", "True (bool)", "expected a list")),
        ("prune__keep", 0.5, ("prune.keep[0]", "0.5 (float)", "expected int")),
        ("prune__ratios", ["0.5"], ("ratios[0]", "'0.5' (str)", "expected float")),
        ("prune", 3, ("prune", "3 (int)", "expected a table")),
        ("parts", "folder", ("parts", "'folder' (str)", "expected a table")),
        ("parts__clip", 3, ("parts", "3 (int)", "expected str")),
        ("image__canvas", 672, ("image.canvas", "672 (int)", "expected str")),
        ("vision__heads", "many", ("vision.heads", "'many' (str)", "expected int")),
    ],
)
def test_a_set_value_of_the_wrong_type(key, value, parts):
    message = refusal("refshapes", **{key: value})
    for part in ("refshapes.toml", *parts):
        assert part in message


def test_a_set_key_below_a_value():
    assert "'family' is a value, not a table" in refusal("refshapes", family__name="x")


@pytest.mark.parametrize("text", ["prompt.answer", "=3", "", "Prompt.answer=3", "a..b=1", "a =1"])
def test_set_text_that_is_no_assignment(text):
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse_override(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt.answer=32", ("prompt.answer", 32)),
        ("prune.ratios=[0.25, 0.5]", ("prune.ratios", [0.25, 0.5])),
        ("dtype=float16", ("dtype", "float16")),
        ('dtype="float16"', ("dtype", "float16")),
        ("prompt.template=a=b: {phrase}", ("prompt.template", "a=b: {phrase}")),
        ("prompt.template=", ("prompt.template", "")),
        ("prune.extra_token=append", ("prune.extra_token", "append")),
        ("parts.clip=../clip-vit", ("parts.clip", "../clip-vit")),
        ("image.canvas=672x672/4:3,336x672", ("image.canvas", "672x672/4:3,336x672")),
        ("prune.seed=" + "7" * 5000, ("prune.seed", "7" * 5000)),
        ("prune.seed=" + "[" * 5000, ("prune.seed", "[" * 5000)),
    ],
)
def test_set_text_is_toml_or_a_bare_string(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("model", ["~nobody-of-that-name", "~nobody-of-that-name/x", "~\0"])
def test_the_home_of_nobody(model):
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(model, {})
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(model)


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("key", ["suffix", "answer"])
def test_counts_below_one(key, count):
    assert f"prompt.{key} is {count}" in refusal("refshapes", **{f"prompt__{key}": count})


@pytest.mark.parametrize("key", ["heads", "side"])
def test_facts_of_a_vision_tower_are_counts(key):
    assert f"vision.{key} is 0" in refusal("refshapes", **{f"vision__{key}": 0})
    config = load_config("refshapes", {f"vision.{key}": 7}).config
    assert getattr(config.vision, key) == 7


def test_parts_are_named_by_role(toml):
    path = toml('family = "llava"\ncheckpoint = "a/b"\n[parts]\nclip = "org/clip"\n')
    assert load_config(str(path), {}).config.parts == {"clip": "org/clip"}
    assert request_for(str(path), "--set", "parts.clip=./mine").parts == {"clip": "./mine"}
    assert request_for(str(path), "--set", "parts.base=x").parts == {
        "clip": "org/clip",
        "base": "x",
    }


def test_no_ratio_at_all():
    assert "prune.ratios is empty" in refusal("refshapes", prune__ratios=[])


@pytest.mark.parametrize("template", ["<image> Where is it?", "<image> {phrase} {phrase}"])
def test_a_template_needs_one_phrase(template):
    assert "{phrase}" in refusal("refshapes", prompt__template=template)


@pytest.mark.parametrize(
    "template", ["Where is {phrase}?", "<image><image> {phrase}", "{phrase} in <image>"]
)
def test_a_template_needs_one_image_before_the_phrase(template):
    message = refusal("refshapes", prompt__template=template)
    assert "template" in message
    assert "<image>" in message


def test_a_negative_seed_is_refused():
    assert "seed" in refusal("refshapes", prune__seed=-1)


def test_a_negative_prefix_is_refused():
    assert "prefix" in refusal("refshapes", prompt__prefix=-1)


@pytest.mark.parametrize("written", ["./weights", "../{parent}/weights", "weights"])
def test_a_relative_checkpoint_is_relative_to_its_file(toml, tmp_path, monkeypatch, written):
    (tmp_path / "weights").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = written.replace("{parent}", tmp_path.name)
    path = toml(f'family = "llava"\ncheckpoint = "{text}"')
    found = load_config(str(path), {}).config.checkpoint
    assert Path(found) == tmp_path / "weights"


def test_a_hub_id_in_a_file_stays_one(toml):
    path = toml('family = "llava"\ncheckpoint = "llava-hf/llava-1.5-7b-hf"')
    assert load_config(str(path), {}).config.checkpoint == "llava-hf/llava-1.5-7b-hf"


def test_a_hub_id_as_the_model():
    named = load_config("some-org/some-model.v2", {})
    assert named.name == "some-model.v2"
    assert named.config.checkpoint == "some-org/some-model.v2"


def model_folder(path, model_type):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return path


def test_a_checkpoint_folder_names_its_own_family(tmp_path):
    named = load_config(str(model_folder(tmp_path / "mine", "llava")), {})
    assert (named.name, named.config.family) == ("mine", "llava")
    assert named.config.checkpoint == str(tmp_path / "mine")


@pytest.mark.parametrize("model_type", ["gpt2", "llava_next_video", "../llava"])
def test_a_folder_of_another_model_type(tmp_path, model_type):
    folder = model_folder(tmp_path / "mine", model_type)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert f"model_type '{model_type}' is none of the families that there are (" in message
    assert "llava, llava_next" in message


@pytest.mark.parametrize("model_type", ["", None])
def test_a_folder_whose_config_names_no_model_type(tmp_path, model_type):
    folder = model_folder(tmp_path / "mine", model_type)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: no model_type in it")
    assert "llava, llava_next" in message
    assert "gap-export NAME --checkpoint FOLDER" in message


def test_the_nearest_model_is_named(tmp_path):
    assert "llava-next-vicuna-7b" in refusal(model_folder(tmp_path / "mine", "llava_mpt"))


def test_a_folder_without_a_config(tmp_path):
    assert f"{tmp_path}: no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_folder_with_a_broken_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in refusal(tmp_path)


def test_a_config_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "refshapes", "llava")
    shipped = load_config("refshapes", {}).config.checkpoint
    local = load_config("./refshapes", {}).config.checkpoint
    assert Path(shipped) == ROOT / "refshapes" / "checkpoint"
    assert Path(local).resolve() == tmp_path / "refshapes"


def test_flags_win_over_set_and_set_over_the_file(toml):
    path = toml(
        'family = "llava"\ncheckpoint = "a/b"\ndtype = "float32"\n'
        '[prune]\nratios = [0.25]\npositions = "permuted"\nseed = 4\n'
    )
    config = request_for(
        str(path),
        *("--ratio", "0.75", "--ratio", "0.5"),
        *("--set", "prune.ratios=[0.1]", "--set", "prune.positions=compact"),
        *("--dtype", "float16", "--set", "dtype=bfloat16", "--pruner", "random"),
    )
    assert config.prune == PruneConfig(
        strategy="random", ratios=(0.75, 0.5), positions="compact", seed=4
    )
    assert config.dtype == "float16"


def test_the_file_wins_over_defaults(toml):
    path = toml('family = "llava"\ncheckpoint = "a/b"\n[prune]\nratios = [0.25, 0.5]\n')
    assert request_for(str(path)).prune.ratios == (0.25, 0.5)


def test_the_checkpoint_flag_wins_over_the_file(tmp_path):
    config = request_for("llava-1.5-7b", "--checkpoint", str(tmp_path))
    assert config.checkpoint == str(tmp_path)


def test_integers_are_taken_where_fractions_are_meant():
    assert load_config("refshapes", {"prune.ratios": [0]}).config.prune.ratios == (0.0,)


def test_an_unknown_key_in_a_file_names_file_and_key(toml):
    with pytest.raises(
        RecordError,
        match=r"unknown key 'familly'; did you mean family\? have",
    ):
        load_config(str(toml('familly = "llava"\ncheckpoint = "a/b"')), {})


def test_a_missing_key_in_a_file_names_file_and_key(toml):
    with pytest.raises(RecordError, match=r"mine\.toml: key 'checkpoint' is missing"):
        load_config(str(toml('family = "llava"')), {})


def test_an_unknown_family_in_a_file_is_refused_before_any_download(toml):
    assert "lava" in refusal(toml('family = "lava"\ncheckpoint = "a/b"'))


def test_a_misspelt_published_name_of_a_pruner_gets_its_neighbour():
    with pytest.raises(UnknownNameError, match=r"did you mean FasterVLM\?") as caught:
        load_config("refshapes", {"prune.strategy": "fastervl"})
    assert "have cdpruner, cls_attention" in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"did you mean visionzip\?"):
        load_config("refshapes", {"prune.strategy": "visionzipp"})


def test_data_is_found_inside_an_installed_package(tmp_path, monkeypatch):
    inside = tmp_path / "gap_export" / "export_configs"
    inside.mkdir(parents=True)
    monkeypatch.setattr(
        shipped, "__file__", str(tmp_path / "gap_export" / "config" / "shipped.py")
    )
    assert shipped.package_data("export_configs") == inside
    assert shipped.package_data("refshapes") == tmp_path / "refshapes"
