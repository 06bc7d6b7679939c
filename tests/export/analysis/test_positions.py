"""`gap-export positions` and `gap-export count`, on refshapes and on other families."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from makers.families import PHRASE, READ_PHRASE, find_family, make_picture
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from truths import placing
from truths import pruners as truth
from truths.families import find_truth

from gap_export.cli import main as cli
from gap_export.config.records import EXTRA_RULES, GRID_MODE, POSITION_MODES
from gap_export.config.shipped import package_data
from gap_runtime.bundle.layout import count_kept
from gap_runtime.registry import list_plugins, load_plugin

MODES = [mode for mode in POSITION_MODES if mode != GRID_MODE]
PRUNERS = sorted(list_plugins("gap_export.pruners"))
MODULES = {name: load_plugin("gap_export.pruners", name, "pruner") for name in PRUNERS}
ADAPTIVE = tuple(name for name in PRUNERS if hasattr(MODULES[name], "count_adaptively"))
CONSTANT = tuple(name for name in PRUNERS if not MODULES[name].NEEDS)
EMBEDDINGS = "prune.phrase=embeddings"
REFSHAPES = package_data("refshapes")
SAMPLES = REFSHAPES / "samples"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run gap-export in an empty folder, which stays empty; its exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run_in_process(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert not list((tmp_path / "here").iterdir())
        return code, captured.out, captured.err

    return run_in_process


@pytest.fixture
def get(run):
    """What a command that works prints with `--json`."""

    def run_with_json(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run_with_json


@pytest.fixture
def refuse(run):
    """The message of a command that does not work, after its kind."""

    def run_with_json(code, kind, *arguments):
        found, out, err = run(*arguments, "--json")
        error = json.loads(out)["error"]
        assert (found, error["kind"]) == (code, kind), error
        assert "\n" not in error["message"]
        assert err.splitlines()[-1] == f"error: {error['message']}"
        return error["message"]

    return run_with_json


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    return lambda name: find_family(name, tmp_path_factory)


def arguments_of(case, pruner):
    """How the command line is told about a family of tests/makers/families.py."""
    checkpoint = ["--checkpoint", case.checkpoint] if case.checkpoint else []
    overrides = case.overrides | (case.text if pruner in READ_PHRASE else {})
    settings = [part for item in overrides.items() for part in ("--set", "{}={}".format(*item))]
    return [case.model, *checkpoint, *settings, "--pruner", pruner]


def refshapes_with(pruner):
    return ["refshapes", "--pruner", pruner, "--set", EMBEDDINGS]


def require_modes(mapping, order, weights=None, rule=None):
    """All four modes of one ratio, by tests/truths/pruners.py."""
    assert [mode["mode"] for mode in mapping["modes"]] == MODES
    for mode in mapping["modes"]:
        prefix, suffix = len(mode["prefix_ids"]), len(mode["suffix_ids"])
        slots, ids, first = placing.place(
            prefix, mapping["patches"], suffix, order, mode["mode"], rule, weights
        )
        assert mode["visual_slots"] == [-1 if slot == placing.EXTRA else slot for slot in slots]
        assert [*mode["prefix_ids"], *mode["visual_ids"][0], *mode["suffix_ids"]] == ids
        assert mode["first_answer_id"] == first


def own_order(mapping):
    """Kept tokens as the pruner gave them, which one of the modes keeps."""
    permuted = next(mode for mode in mapping["modes"] if mode["mode"] == "permuted")
    return [slot for slot in permuted["visual_slots"] if slot != -1]


# positions


@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_pruners_positions_without_a_picture(get, pruner):
    ratios = (0, 0.25, 0.9)
    flags = [part for ratio in ratios for part in ("--ratio", ratio)]
    found = get("positions", *refshapes_with(pruner), *flags)
    assert [mapping["ratio"] for mapping in found] == list(ratios)
    tokenizer = AutoTokenizer.from_pretrained(REFSHAPES / "checkpoint")
    ids = tokenizer("USER: <image>\nWhere is the red mug? ASSISTANT:")["input_ids"]
    before = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
    for mapping in found:
        kept = count_kept(64, mapping["ratio"])
        extra = int(pruner in ADAPTIVE and kept < 64)
        assert (mapping["patches"], mapping["kept"], mapping["extra"]) == (64, kept, extra)
        order = own_order(mapping)
        assert len(set(order)) == len(order) == kept
        require_modes(mapping, order, rule="last-visual" if extra else None)
        assert len(mapping["modes"][0]["prefix_ids"]) == before
        assert len(mapping["modes"][0]["suffix_ids"]) == len(ids) - before - 1
        if pruner in CONSTANT:
            grids = ([(8, 8)],) if pruner == "spatial" else (64,)
            rest = () if pruner == "spatial" else (0,)
            assert order == getattr(truth, pruner)(*grids, kept, *rest).order
            assert mapping["example"] == "kept of every picture"
        else:
            assert "an example" in mapping["example"]
            assert "--image" in mapping["example"]


def test_another_seed_is_another_draw(get):
    flags = (*refshapes_with("random"), "--ratio", 0.5, "--set", "prune.seed=7")
    (found,) = get("positions", *flags)
    require_modes(found, truth.random(64, 32, 7).order)


@pytest.mark.parametrize("pruner", [p for p in PRUNERS if p not in ADAPTIVE])
def test_positions_of_a_picture_are_what_the_formulas_keep(get, find, pruner):
    case = find("shikra")
    (found,) = get(
        *("positions", *arguments_of(case, pruner), "--ratio", 0.4),
        *("--image", case.picture, "--phrase", PHRASE),
    )
    assert found["example"] == "kept of picture.png"
    seen = look(case, case.picture)
    order = seen.prune(pruner, found["kept"], [(6, 6)]).order
    assert found["kept"] == count_kept(36, 0.4)
    require_modes(found, order)


def look(case, picture, phrase=PHRASE):
    """The independent towers on the pixels that PyTorch's reference takes."""
    pixels, size = pixels_of(case, picture)
    return find_truth(case).look(pixels, size, phrase)


_models = {}


def pixels_of(case, path):
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if case.home not in _models:
        plan = case.plan("unused")
        _models[case.home] = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    return _models[case.home].make_pixels(picture), picture.size


@pytest.mark.parametrize(
    ("pruner", "rule"),
    [
        pytest.param(pruner, rule, marks=() if i % len(ADAPTIVE) == j else pytest.mark.matrix)
        for i, rule in enumerate(EXTRA_RULES)
        for j, pruner in enumerate(ADAPTIVE)
    ],
)
def test_positions_of_a_picture_with_an_extra_token(get, find, pruner, rule):
    """In the first of two buckets; newlines are kept and no part of the extra token."""
    case = find("llava-next-vicuna")
    (found,) = get(
        *("positions", *arguments_of(case, pruner), "--ratio", 0.5, "--extra-token", rule),
        *("--image", case.picture, "--phrase", PHRASE),
    )
    seen = look(case, case.picture)
    fixed = sorted(set(range(39)) - set(seen.removable))
    made = seen.prune(pruner, found["kept"] - len(fixed), [(3, 3), (3, 9)])
    order = [*(seen.removable[index] for index in made.order), *fixed]
    weights = [0.0] * 39
    for index, weight in zip(seen.removable, made.weights, strict=True):
        weights[index] = float(weight)
    assert (found["bucket"], found["patches"], found["kept"]) == ("126x42-3x9", 39, 20)
    assert found["extra"] == int(rule != "drop")
    require_modes(found, order, weights, None if rule == "drop" else rule)


def test_the_picture_decides_about_the_bucket(get, find, refuse, tmp_path):
    case = find("llava-next-vicuna")
    flags = (*arguments_of(case, "spatial"), "--ratio", 0.2, "--ratio", 0.5)
    both = get("positions", *flags)
    assert [(m["bucket"], m["ratio"]) for m in both] == [
        *(("126x42-3x9", ratio) for ratio in (0.2, 0.5)),
        *(("126x42-1x9", ratio) for ratio in (0.2, 0.5)),
    ]
    make_picture(270, 30).save(tmp_path / "flat.png")
    thin = get("positions", *flags, "--image", tmp_path / "flat.png")
    assert [mapping["example"] for mapping in thin] == ["kept of flat.png"] * 2
    assert [mapping["modes"] for mapping in thin] == [mapping["modes"] for mapping in both[2:]]
    make_picture(30, 270).save(tmp_path / "tall.png")
    message = refuse(2, "input", "positions", *flags, "--image", tmp_path / "tall.png")
    assert "--set image.canvas=42x126/30:270" in message


@pytest.mark.parametrize("name", ["refshapes", "minigpt-v2"])
def test_positions_for_people(run, find, name):
    arguments = ["refshapes"] if name == "refshapes" else arguments_of(find(name), "prumerge")
    code, out, _ = run("positions", *arguments, "--ratio", 0.5, "--ratio", 0.75)
    assert code == 0
    plain = re.sub(r"[^\x20-\x7e\n]", " ", out)
    for mode in MODES:
        assert plain.count(f" {mode} ") >= 2
    total = 64 if name == "refshapes" else 16
    for ratio in (0.5, 0.75):
        kept = count_kept(total, ratio)
        extra = " and 1 made of the rest" if name != "refshapes" else ""
        title = f"ratio {ratio:g}: {kept} of {total} visual tokens{extra}"
        assert title in " ".join(plain.split())
    for row in (
        "text before: IDs",
        "visual slots: tokens",
        "visual slots: IDs",
        "text after: IDs",
    ):
        assert plain.count(row) == 2
    assert plain.count("first answer token: ID") == 2
    assert ("extra" in plain) == (name != "refshapes")


def test_the_ids_in_the_table_are_those_of_json(run, get):
    flags = ("positions", *refshapes_with("spatial"), "--ratio", 0.9)
    (found,) = get(*flags)
    _, out, _ = run(*flags)
    last = next(line for line in out.splitlines() if "first answer token" in line)
    numbers = [int(number) for number in re.findall(r"\d+", last)]
    assert numbers == [mode["first_answer_id"] for mode in found["modes"]]
    shown = next(line for line in out.splitlines() if "visual slots: tokens" in line)
    slots = found["modes"][0]["visual_slots"]
    assert re.findall(r"\d+", shown)[:6] == [str(slot) for slot in slots[:6]]


def test_longer_phrases_have_more_text_behind_the_picture(get):
    counts = []
    for phrase in ("x", "the large red circle on the left"):
        (found,) = get("positions", "refshapes", "--phrase", phrase)
        assert len({len(mode["suffix_ids"]) for mode in found["modes"]}) == 1
        counts.append(len(found["modes"][0]["suffix_ids"]))
    assert counts[1] > counts[0] + 3


def test_spaces_in_a_phrase_mean_nothing(get, find):
    """As in the runtime; SentencePiece would have tokens for them."""
    case = find("minigpt-v2")
    flags = ("positions", *arguments_of(case, "text_similarity"), "--image", case.picture)
    plain, spaced = (
        get(*flags, "--phrase", phrase) for phrase in ("the red ring", "  the red \t  ring ")
    )
    assert spaced == plain


@pytest.mark.parametrize(
    ("code", "kind", "flags", "part"),
    [
        (2, "unknown-name", ["--pruner", "divprun"], "did you mean divprune"),
        (2, "config", ["--extra-token", "first"], "prune.extra_token 'first'"),
        (2, "config", ["--ratio", "0.999"], "leaves none of 64"),
        (2, "input", ["--phrase", ""], "the phrase is empty"),
        (2, "input", ["--phrase", "a <image> b"], "<image>"),
        (2, "input", ["--image", "nowhere.png"], "nowhere.png: no such file"),
        (2, "input", ["--image", "."], "a folder"),
        (3, "checkpoint", ["--pruner", "trim", "--set", "parts.clip=nowhere"], "no such part"),
        (3, "checkpoint", ["--checkpoint", "nowhere"], "no such checkpoint"),
    ],
)
def test_positions_that_cannot_be_shown(refuse, code, kind, flags, part):
    assert part in refuse(code, kind, "positions", "refshapes", *flags)


# count


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures without phrases, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(5):
        make_picture(70 + 9 * k, 60, seed=k).save(folder / f"{k}.{'jpg' if k % 2 else 'png'}")
    (folder / "notes.txt").write_text("none", encoding="utf-8")
    return folder


def require_counts(found, counts, patches, fixed=0, bucket=""):
    """The summary of counts; each ratio must keep exactly as many."""
    counts = [max(1, count) + fixed for count in counts]
    assert (found["bucket"], found["patches"]) == (bucket, patches)
    assert found["pictures"] == len(counts)
    assert (found["least"], found["most"]) == (min(counts), max(counts))
    assert found["mean"] == pytest.approx(statistics.fmean(counts), abs=0.01)
    assert min(counts) <= found["ninth_decile"] <= max(counts)
    assert sum(count <= found["ninth_decile"] for count in counts) >= 0.9 * len(counts) - 1
    for name in ("mean", "ninth_decile"):
        assert count_kept(patches, found[f"ratio_of_{name}"]) == round(found[name])


@pytest.mark.parametrize("name", ["shikra", "minigpt-v2"])
@pytest.mark.parametrize("pruner", ADAPTIVE)
def test_counts_are_those_of_the_published_rules(get, find, pictures, name, pruner):
    case = find(name)
    phrase = ["--phrase", PHRASE] if pruner == "trim" else []
    found = get("count", *arguments_of(case, pruner), "--images", pictures, *phrase)
    files = sorted(path for path in pictures.iterdir() if path.suffix != ".txt")
    counts = [look(case, path).count_adaptively(pruner) for path in files]
    assert (found["pruner"], found["skipped"]) == (pruner, [])
    (bucket,) = found["buckets"]
    require_counts(bucket, counts, 36 if name == "shikra" else 16)


def refshapes_counts():
    """PruMerge's counts of refshapes' samples, from the library's own model."""
    model = LlavaForConditionalGeneration.from_pretrained(
        REFSHAPES / "checkpoint", dtype=torch.float64, attn_implementation="eager"
    ).eval()
    layer = model.config.vision_feature_layer
    from transformers import LlavaImageProcessorPil

    processor = LlavaImageProcessorPil.from_pretrained(REFSHAPES / "checkpoint", do_pad=True)
    counts = {"prumerge": [], "prumerge_plus": []}
    entries = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    for entry in entries:
        with Image.open(SAMPLES / entry["image"]) as picture:
            pixels = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        tower = model.model.vision_tower
        with torch.no_grad():
            states = tower(pixels.double(), output_hidden_states=True).hidden_states
            number = layer % len(states)
            block = tower.encoder.layers[min(number, len(states) - 2)]
            rows = block.layer_norm1(states[min(number, len(states) - 2)])[0]
            query, keys = block.self_attn.q_proj(rows[0]), block.self_attn.k_proj(rows)
        a = truth._one_head_attention(query.numpy(), keys.numpy())
        counts["prumerge"].append(truth.adaptive_count_iqr(a))
        counts["prumerge_plus"].append(truth.prumerge_plus_adaptive_count(a))
    return counts


@pytest.mark.parametrize("pruner", ["prumerge", "prumerge_plus"])
def test_counts_of_refshapes_samples(get, pruner):
    found = get("count", "refshapes", "--images", SAMPLES, "--pruner", pruner)
    (bucket,) = found["buckets"]
    require_counts(bucket, refshapes_counts()[pruner], 64)


def test_phrases_come_from_samples_json(get, find, tmp_path):
    """With --phrase beside it, which stands for pictures without one only."""
    case = find("shikra")
    phrases = ["the red box", "a", PHRASE]
    for k, _ in enumerate(phrases):
        make_picture(60 + k, 50, seed=k + 20).save(tmp_path / f"{k}.png")
    entries = [{"image": f"{k}.png", "phrase": phrase} for k, phrase in enumerate(phrases)]
    (tmp_path / "samples.json").write_text(json.dumps(entries), encoding="utf-8")
    found = get("count", *arguments_of(case, "trim"), "--images", tmp_path)
    counts = [
        look(case, tmp_path / f"{k}.png", phrase).count_adaptively("trim")
        for k, phrase in enumerate(phrases)
    ]
    require_counts(found["buckets"][0], counts, 36)


def test_buckets_are_counted_apart_and_other_pictures_left_out(get, run, find, tmp_path):
    case = find("llava-next-vicuna")
    sizes = {"a": (160, 50), "b": (150, 48), "c": (270, 30), "d": (40, 90)}
    for seed, (name, size) in enumerate(sizes.items()):
        make_picture(*size, seed=seed).save(tmp_path / f"{name}.png")
    flags = ("count", *arguments_of(case, "prumerge"), "--images", tmp_path)
    found = get(*flags)
    first, second = found["buckets"]
    counts = [look(case, tmp_path / f"{name}.png").count_adaptively("prumerge") for name in "abc"]
    require_counts(first, counts[:2], 39, 3, "126x42-3x9")
    require_counts(second, counts[2:], 19, 1, "126x42-1x9")
    # Newlines count too: three in the first bucket, one in the second.
    every = [counts[0] + 3, counts[1] + 3, counts[2] + 1]
    assert [each["kept"] for each in found["pictures"]] == every
    assert [Path(each["picture"]).stem for each in found["pictures"]] == list("abc")
    (skipped,) = found["skipped"]
    assert "40x90" in skipped
    _, out, err = run(*flags)
    assert "left out: " in err
    assert "126x42-3x9" in out


def test_count_for_people(run, find, pictures):
    case = find("minigpt-v2")
    code, out, _ = run("count", *arguments_of(case, "prumerge"), "--images", pictures)
    assert code == 0
    plain = " ".join(re.sub(r"[^\x20-\x7e\n]", " ", out).split())
    assert "prumerge on" in plain
    assert re.search(r"\ball 5 16 \d+ ", plain)
    assert re.search(r"--keep \d+ \(mean\) or \d+", plain)


@pytest.mark.parametrize("pruner", [p for p in PRUNERS if p not in ADAPTIVE])
def test_pruners_without_an_adaptive_rule(refuse, pictures, pruner):
    message = refuse(2, "config", "count", *refshapes_with(pruner), "--images", pictures)
    assert message == (
        f"pruner '{pruner}' has no adaptive rule (prumerge, prumerge_plus, trim have one); choose "
        "a --ratio or --keep yourself"
    )


def test_counting_what_cannot_be(refuse, find, pictures, tmp_path):
    flags = ("count", "refshapes", "--pruner", "prumerge", "--images")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refuse(2, "input", *flags, empty) == f"{empty}: no pictures in it"
    assert refuse(2, "input", *flags, tmp_path / "no") == f"{tmp_path / 'no'}: no such folder"
    file = pictures / "0.png"
    assert refuse(2, "input", *flags, file) == f"{file}: no such folder"
    shutil.copyfile(pictures / "notes.txt", empty / "broken.png")
    message = refuse(2, "input", *flags, empty)
    assert message.startswith(f"{empty}: none of 1 pictures can be used; {empty / 'broken.png'}")
    case = find("shikra")
    flags = ("count", *arguments_of(case, "trim"), "--images", pictures)
    message = refuse(2, "config", *flags)
    assert message == "pruner 'trim' reads the phrase; give one with --phrase"


def test_one_broken_picture_does_not_stop_the_others(get, pictures, tmp_path):
    for path in pictures.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    flags = ("count", "refshapes", "--pruner", "prumerge", "--images")
    whole, found = get(*flags, pictures), get(*flags, tmp_path)
    assert found["buckets"] == whole["buckets"]
    (skipped,) = found["skipped"]
    assert "broken.png" in skipped
