"""The reference of a machine with less memory than the model: read layer by layer, the same."""

import json
import math
from dataclasses import replace

import pytest
import torch
from makers.families import FAMILIES, find_family
from truths.references import SAME, require_same_references

from gap_export.cli.main import main
from gap_export.config.shipped import package_data
from gap_export.pipeline import asking
from gap_export.pipeline import run as pipeline
from gap_export.pipeline.asking import load_reference, measure_reference
from gap_export.reference import files, memory
from gap_export.reference.record import record_answers
from gap_runtime.display import Display

ALL = 2**40


@pytest.fixture(
    params=[
        # Both are of parts that others have too.
        pytest.param(
            name,
            marks=pytest.mark.matrix if name in {"llava-next-vicuna", "internvl3.5"} else (),
        )
        for name in FAMILIES
    ]
)
def case(request, tmp_path_factory):
    return find_family(request.param, tmp_path_factory)


def ask_pytorch(plan, folder, kept):
    """Records, arrays and what the linear layers saw."""
    folder.mkdir()
    reference = load_reference(plan, kept)
    with reference.model.observe() as summarize:
        records, arrays = record_answers(reference, plan.samples, plan.entries, folder)
        statistics = summarize()
    return records, arrays, statistics


def require_same(found, truth):
    require_same_references(found[:2], truth[:2])
    assert found[2].keys() == truth[2].keys()
    for name, seen in truth[2].items():
        for part in ("mean_square", "mean_size"):
            values, wanted = getattr(found[2][name], part), getattr(seen, part)
            torch.testing.assert_close(values, wanted, **SAME, msg=name)


def test_answers_are_those_of_a_model_in_memory(case, tmp_path):
    plan = case.plan(tmp_path / "out", reference=True)
    truth = ask_pytorch(plan, tmp_path / "whole", None)
    for kept in (0, 40_000, ALL):
        require_same(ask_pytorch(plan, tmp_path / str(kept), kept), truth)


@pytest.mark.parametrize(
    "name", [pytest.param("llava", marks=pytest.mark.matrix), "llava-next-vicuna"]
)
def test_phrases_are_read_the_same(name, tmp_path, tmp_path_factory):
    plan = find_family(name, tmp_path_factory).plan(
        tmp_path / "out", reference=True, pruner="trim"
    )
    truth = ask_pytorch(plan, tmp_path / "whole", None)
    require_same(ask_pytorch(plan, tmp_path / "streamed", 0), truth)


@pytest.fixture
def read_sizes(monkeypatch):
    """Values of each piece of a file that is read, in order."""
    found = []
    real = files.read_tensor

    def read(location):
        found.append((location.key, location.shape))
        return real(location)

    monkeypatch.setattr(files, "read_tensor", read)
    return found


def load(plan, kept):
    return load_reference(plan, kept).model


def run_once(model, plan, rows=3):
    embeddings = torch.zeros(rows, plan.spec.decoder.width)
    return model.run_decoder(embeddings, torch.arange(rows)[None], model.start_cache())


def test_every_pass_reads_every_matrix_once(case, tmp_path, read_sizes):
    plan = case.plan(tmp_path / "out")
    model = load(plan, 0)
    keys = []
    for _ in range(2):
        read_sizes.clear()
        run_once(model, plan)
        keys.append([key for key, _ in read_sizes if not key.endswith(".bias")])
    assert keys[0] == keys[1]
    matrices = 7 * plan.spec.decoder.layers + 1
    if case.name == "shikra":
        # Deltas and what they are added to have the same keys.
        matrices *= 2
    if case.name == "minigpt-v2":
        # Two of each layer have two matrices of LoRA.
        matrices += 4 * plan.spec.decoder.layers
    assert len(keys[0]) == matrices


def test_what_may_stay_is_read_once(case, tmp_path, read_sizes):
    plan = case.plan(tmp_path / "out")
    model = load(plan, ALL)
    first = run_once(model, plan)
    read_sizes.clear()
    assert torch.equal(run_once(model, plan), first)
    assert read_sizes == []


def test_a_part_of_the_weights_stays(tmp_path, tmp_path_factory, read_sizes):
    """As many as the limit has room for, not one more."""
    plan = find_family("llava", tmp_path_factory).plan(tmp_path / "out")
    sizes = {name: 4 * math.prod(source.shape) for name, source in plan.sources.items()}
    query = sizes["language_model.layers.0.self_attn.q_proj.weight"]
    for room, less in ((query - 1, 0), (query, 1)):
        model = load(plan, room)
        run_once(model, plan)
        read_sizes.clear()
        run_once(model, plan)
        assert sum("q_proj" in key for key, _ in read_sizes) == plan.spec.decoder.layers - less


def test_the_table_is_read_row_by_row(case, tmp_path, read_sizes):
    plan = case.plan(tmp_path / "out")
    model = load(plan, ALL)
    read_sizes.clear()
    ids = [3, plan.spec.decoder.vocabulary - 1, 3]
    rows = model.embed(ids)
    assert {shape[0] for _, shape in read_sizes} == {1}
    assert torch.equal(rows, load(plan, None).embed(ids))
    assert model.embed([]).shape == (0, plan.spec.decoder.width)


def test_nothing_stays_after_a_pass(tmp_path, tmp_path_factory):
    plan = find_family("llava", tmp_path_factory).plan(tmp_path / "out")
    model = load(plan, 0)
    run_once(model, plan)
    parameters = list(model._language._decoder.parameters())
    assert {each.is_meta for each in parameters if each.ndim > 1} == {True}
    assert {each.is_meta for each in parameters if each.ndim == 1} == {False}


def test_an_export_chooses_it_when_memory_is_short_and_says_so(
    tmp_path, tmp_path_factory, monkeypatch, capsys
):
    plan = find_family("llava", tmp_path_factory).plan(tmp_path / "out", reference=True)
    free = measure_reference(plan).weights + 192 * 2**20 - 1
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    result = pipeline.export(plan, Display())
    assert result.report is not None
    assert result.report.passed
    said = " ".join(capsys.readouterr().err.split())
    assert "layer by layer for every token" in said
    assert "asking PyTorch, layer by layer (" in said


@pytest.mark.parametrize("answers", [1, 2])
def test_progress_is_told_for_every_token(tmp_path, tmp_path_factory, answers):
    plan = find_family("llava", tmp_path_factory).plan(
        tmp_path / "out", reference=True, prompt__answer=answers
    )
    told = []
    (tmp_path / "folder").mkdir()
    folder = tmp_path / "folder"
    record_answers(
        load_reference(plan, 0),
        plan.samples,
        plan.entries,
        folder,
        lambda share, now: told.append((share, now)),
    )
    starts = [(share, now) for share, now in told if "token" not in now]
    assert [share for share, _ in starts] == [0, 0.5]
    assert [now.partition(", ")[2] for _, now in starts] == ["unpruned", "ratio 0.5"]
    assert max(now.count("token") for _, now in told) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("positions", "refshapes", "--image", "PICTURE", "--phrase", "the red mug"),
        ("count", "refshapes", "--pruner", "prumerge", "--images", "FOLDER"),
        ("evaluate", "refshapes", "--data", "refshapes:test", "--limit", "2"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_commands_read_layers_too_where_memory_is_short(arguments, monkeypatch, capsys):
    samples = package_data("refshapes") / "samples"
    places = {"PICTURE": str(samples / "test-006.png"), "FOLDER": str(samples)}
    command = [places.get(argument, argument) for argument in arguments]
    assert main([*command, "--json"]) == 0
    whole = capsys.readouterr()
    real = asking.measure_memory
    monkeypatch.setattr(
        asking,
        "measure_memory",
        lambda *given, **named: replace(real(*given, **named), weights=2**60),
    )
    assert main([*command, "--json"]) == 0
    streamed = capsys.readouterr()
    said = "they are read layer by layer"
    assert (said in whole.err, said in streamed.err) == (False, True)
    assert drop_times(json.loads(streamed.out)) == drop_times(json.loads(whole.out))


def drop_times(found):
    """A command's answer without milliseconds."""
    if isinstance(found, list):
        return [drop_times(each) for each in found]
    if not isinstance(found, dict):
        return found
    return {k: drop_times(v) for k, v in found.items() if "ms" not in k and "milli" not in k}


def test_too_little_even_for_layers_asks_for_another_machine(monkeypatch, capsys):
    samples = package_data("refshapes") / "samples"
    monkeypatch.setattr(memory, "free_memory", lambda: 10**6)
    code = main(["positions", "refshapes", "--image", str(samples / "test-006.png")])
    assert code == 3
    error = capsys.readouterr().err
    assert "use a larger machine" in error
    assert "--no-reference" not in error


def test_a_setting_is_named_as_the_reason(capsys):
    picture = package_data("refshapes") / "samples" / "test-006.png"
    arguments = ["positions", "refshapes", "--image", str(picture)]
    assert main([*arguments, "--set", "check.memory_mib=0"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "check.memory_mib is set: they are read layer by layer" in said
    assert "is free" not in said
