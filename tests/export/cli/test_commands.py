"""What `gap-export` says of an export, of positions and of counts."""

import json
import shutil

import pytest
from truths import placing

from gap_export.config.records import GRID_MODE, POSITION_MODES
from gap_export.config.shipped import package_data
from gap_runtime.bundle.layout import count_kept

TEMPLATE = "prompt.template=USER: <image>\nWhere is {phrase}? ASSISTANT:"


def test_dry_run_facts(run, tiny_llava, tmp_path):
    code, out, err = run(
        *(tiny_llava, "--dry-run", "--json", "--ratio", "0.5", "--ratio", "0.75"),
        *("--set", TEMPLATE, "--set", "prompt.suffix=24", "--set", "prompt.answer=8"),
        *("--positions", "compact", "--dtype", "float16"),
    )
    facts = json.loads(out)
    assert code == 0
    assert "Traceback" not in err
    assert facts["bundle"] == "tiny-llava-13-6of25"
    assert facts["ratios"] == [
        {"ratio": 0.5, "bucket": "", "patches": 25, "kept": 13, "extra": 0},
        {"ratio": 0.75, "bucket": "", "patches": 25, "kept": 6, "extra": 0},
    ]
    layout = facts["layout"]
    assert layout["capacity"] == layout["prefix"] + 13 + 24 + 8
    assert set(layout) == {"prefix", "suffix", "answer", "capacity"}
    assert (layout["suffix"], layout["answer"]) == (24, 8)
    # Keys and values of 2 layers, 2 heads of 16, 2 bytes each.
    assert facts["cache_bytes"] == layout["capacity"] * 2 * 2 * 2 * 16 * 2
    assert facts["dtype"] == "float16"
    assert facts["config"]["prune"]["positions"] == "compact"
    assert facts["checkpoint"] == str(tiny_llava)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rule", "extra"), [("append", 1), ("drop", 0)])
def test_dry_run_counts_the_token_that_is_made_of_the_rest(run, tiny_llava, rule, extra):
    """Only where something is removed."""
    code, out, err = run(
        *(tiny_llava, "--dry-run", "--json", "--set", TEMPLATE, "--set", "prompt.suffix=24"),
        *("--pruner", "prumerge", "--extra-token", rule, "--ratio", "0.5", "--ratio", "0"),
    )
    facts = json.loads(out)
    layout = facts["layout"]
    assert code == 0
    assert [entry["extra"] for entry in facts["ratios"]] == [extra, 0]
    assert layout["capacity"] == layout["prefix"] + 25 + 24 + layout["answer"]
    assert ("13 + 1 of 25" in err) == (extra == 1)


def test_dry_run_for_people(run, tiny_llava, tmp_path):
    code, out, err = run(tiny_llava, "--dry-run", "--set", TEMPLATE, "--ratio", "0.75")
    assert (code, out) == (0, "tiny-llava-6of25\n")
    assert "6 of 25" in err
    assert "note:" not in err
    assert not list(tmp_path.iterdir())


def test_more_positions_than_the_model_was_made_for_are_noted(run, tiny_llava):
    code, _, err = run(
        *(tiny_llava, "--dry-run", "--set", TEMPLATE),
        *("--set", "prompt.suffix=24", "--set", "prompt.answer=500"),
    )
    assert code == 0
    # 4 before, 25 patches, 24 after and 500 of answer; the first position is 0.
    assert "reach position 552" in " ".join(err.split())
    assert "512 positions" in " ".join(err.split())


def test_dry_run_refuses_what_the_export_would(run, tiny_llava, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    code, _, err = run(tiny_llava, "--dry-run", "--out", "file", "--set", TEMPLATE)
    assert code == 2
    assert "exists and is no bundle" in err


def test_export_with_json(run, tiny_llava, tmp_path):
    code, out, err = run(
        *(tiny_llava, "--json", "--no-reference", "--out", "bundle", "--bring", "link"),
        *("--set", TEMPLATE, "--pruner", "spatial", "--ratio", "0.75"),
    )
    result = json.loads(out)
    assert code == 0
    assert "tracing the decoder" in err
    assert result["bundle"] == "bundle"
    assert result["ratios"] == [
        {"ratio": 0.75, "bucket": "", "patches": 25, "kept": 6, "extra": 0}
    ]
    assert result["checked"] is False
    assert (result["pruner"], result["positions"]) == ("spatial", "gap")
    assert (tmp_path / "bundle" / "manifest.json").is_file()


@pytest.mark.parametrize("rule", ["last-visual", "append", "centroid", "drop"])
@pytest.mark.parametrize("pruner", ["random", "prumerge"])
def test_positions_are_the_oracles(run, tiny_llava, pruner, rule):
    code, out, _ = run(
        *("positions", tiny_llava, "--json", "--set", TEMPLATE, "--phrase", "the mug"),
        *("--pruner", pruner, "--extra-token", rule, "--ratio", "0", "--ratio", "0.75"),
    )
    mappings = json.loads(out)
    assert code == 0
    assert [(m["kept"], m["patches"]) for m in mappings] == [(25, 25), (6, 25)]
    # Without a picture the extra token is said to be made of what is in the middle.
    weights = [int(index == 25 // 2) for index in range(25)]
    for mapping in mappings:
        made = pruner == "prumerge" and rule != "drop" and mapping["kept"] < 25
        assert mapping["extra"] == int(made)
        modes = {mode["mode"]: mode for mode in mapping["modes"]}
        assert list(modes) == [mode for mode in POSITION_MODES if mode != GRID_MODE]
        order = [token for token in modes["permuted"]["visual_slots"] if token != -1]
        for name, mode in modes.items():
            before, after = len(mode["prefix_ids"]), len(mode["suffix_ids"])
            slots, ids, first = placing.place(
                before, 25, after, order, name, rule if made else None, weights
            )
            shown = [placing.EXTRA if s == -1 else s for s in mode["visual_slots"]]
            assert shown == slots
            assert mode["prefix_ids"] + mode["visual_ids"][0] + mode["suffix_ids"] == ids
            assert mode["first_answer_id"] == first


def test_positions_of_a_picture_are_those_of_its_answer(run, refshapes_samples):
    picture = refshapes_samples / "test-006.png"
    code, out, _ = run(
        *("positions", "refshapes", "--json", "--image", picture, "--phrase", "the red one"),
        *("--ratio", "0.5"),
    )
    mapping = json.loads(out)[0]
    assert code == 0
    assert picture.name in mapping["example"]
    modes = {mode["mode"]: mode for mode in mapping["modes"]}
    order = modes["permuted"]["visual_slots"]
    assert sorted(order) == modes["gap"]["visual_slots"]
    assert order != sorted(order)
    assert len(set(order)) == 32


def test_positions_for_people_are_one_table_a_ratio(run, tiny_llava):
    code, out, _ = run(
        *("positions", tiny_llava, "--set", TEMPLATE, "--ratio", "0.5", "--ratio", "0.75")
    )
    assert code == 0
    assert "13 of 25" in out
    assert "6 of 25" in out
    for mode in POSITION_MODES:
        assert (out.count(mode) >= 2) == (mode != GRID_MODE)


def test_the_grid_mode_is_for_tokens_with_three_ids(run, tiny_llava):
    code, _, err = run(tiny_llava, "--set", TEMPLATE, "--positions", "compact-grid", "--dry-run")
    assert code == 2
    assert "a token of family 'llava' has one position ID" in " ".join(err.split())


@pytest.fixture
def refshapes_samples():
    return package_data("refshapes") / "samples"


@pytest.mark.parametrize("listed", [True, False])
def test_count_proposes_ratios_that_keep_what_the_rule_kept(
    run, tmp_path, refshapes_samples, listed
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures = sorted(refshapes_samples.glob("*.png"))
    for path in [*pictures, *([refshapes_samples / "samples.json"] if listed else [])]:
        shutil.copyfile(path, folder / path.name)
    if not listed:
        (folder / "broken.png").write_bytes(b"no picture")
    code, out, err = run(
        "count", "refshapes", "--json", "--images", folder, "--pruner", "prumerge"
    )
    found = json.loads(out)
    assert code == 0
    assert found["pruner"] == "prumerge"
    assert (len(found["skipped"]), "broken.png" in err) == (int(not listed), not listed)
    (bucket,) = found["buckets"]
    assert (bucket["bucket"], bucket["patches"]) == ("", 64)
    assert bucket["pictures"] >= len(pictures)
    assert 1 <= bucket["least"] <= bucket["mean"] <= bucket["most"] <= 64
    for ratio, count in (
        (bucket["ratio_of_mean"], bucket["mean"]),
        (bucket["ratio_of_ninth_decile"], bucket["ninth_decile"]),
    ):
        assert count_kept(64, ratio) == round(count)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--ratio", "0.25,0.5"], [48, 32]),
        (["--ratio", "0.25", "--ratio", "0.5"], [48, 32]),
        (["--ratios", "0.25", "--ratio", "0.5,0.75"], [48, 32, 16]),
        (["--keep", "7"], [7]),
        (["--keep", "40,7", "--keeps", "64"], [40, 7, 64]),
        (["--set", "prune.keep=7"], [7]),
        (["--set", "prune.keep=[7, 8]"], [7, 8]),
        (["--set", "prune.ratios=0.5"], [32]),
        (["--set", "prune.ratios=0.5,0.75"], [32, 16]),
    ],
)
def test_shares_and_counts(run, arguments, kept):
    code, out, _ = run("refshapes", "--dry-run", "--json", *arguments)
    facts = json.loads(out)
    assert code == 0
    assert [entry["kept"] for entry in facts["ratios"]] == kept
    # What an entry is called by keeps as many again.
    assert [count_kept(64, entry["ratio"]) for entry in facts["ratios"]] == kept
    assert facts["bundle"] == f"refshapes-{'-'.join(map(str, kept))}of64"


def test_a_count_wins_over_the_shares_of_a_model_file(run, tmp_path):
    text = (package_data("export_configs") / "refshapes.toml").read_text(encoding="utf-8")
    home = package_data("refshapes") / "checkpoint"
    (tmp_path / "own.toml").write_text(
        text.replace("../refshapes/checkpoint", str(home)) + "[prune]\nratios = [0.25]\n",
        encoding="utf-8",
    )
    code, out, _ = run("own.toml", "--dry-run", "--json", "--keep", "7")
    assert code == 0
    assert [entry["kept"] for entry in json.loads(out)["ratios"]] == [7]
    assert json.loads(out)["config"]["prune"]["ratios"] == []
    both = (tmp_path / "own.toml").read_text(encoding="utf-8") + "keep = [7]\n"
    (tmp_path / "own.toml").write_text(both, encoding="utf-8")
    code, _, err = run("own.toml", "--dry-run")
    assert (code, "own.toml: prune.keep and prune.ratios are two ways" in err) == (2, True)


def test_a_page_is_not_written_into_the_checkpoint(run, tiny_llava):
    place = tiny_llava / "config.json"
    before = place.read_bytes()
    command = ("evaluate", tiny_llava, "--set", TEMPLATE, "--data", "refshapes:test")
    code, out, err = run(*command, "--limit", "1", "--html", place)
    (line,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert (code, out) == (2, "")
    assert line.endswith("which is read; give --html another place")
    assert place.read_bytes() == before
