"""The command line: results on stdout, one line per error, exit codes, JSON."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from gap_runtime import __version__
from gap_runtime.cli.main import main
from gap_runtime.cli.options import run_command


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 20), (200, 200, 200)).save(path)
    return path


def missing_image(folder, tmp_path):
    return ["ground", folder, tmp_path / "nowhere.png", "the mug"]


def text_for_image(folder, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture", encoding="utf-8")
    return ["ground", folder, path, "the mug"]


def missing_bundle(_folder, tmp_path):
    return ["info", tmp_path / "nowhere"]


def no_bundle(_folder, tmp_path):
    return ["info", tmp_path]


def newer_schema(folder, _tmp_path):
    (folder / "manifest.json").write_text('{"schema": 9}', encoding="utf-8")
    return ["info", folder]


def changed_file(folder, _tmp_path):
    (folder / "decoder.onnx").write_bytes(b"no graph at alL")
    return ["info", folder]


def unknown_ratio(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", "the mug", "--ratio", "0.9"]


def unknown_backend(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", "the mug", "--backend", "onxruntime"]


def empty_phrase(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", " "]


def long_phrase(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", "the red red red mug"]


def drawing_of_another_kind(folder, tmp_path):
    photo = tmp_path / "photo.png"
    return ["ground", folder, photo, "the mug", "--draw", tmp_path / "out.txt"]


def ratio_that_is_no_number(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", "the mug", "--ratio", "half"]


def percentage(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", "the mug", "--ratio", "50%"]


def unknown_count(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", "the mug", "--keep", "5"]


def several_ratios(folder, tmp_path):
    return ["ground", folder, tmp_path / "photo.png", "the mug", "--ratio", "0.5,0.75"]


def ratio_and_count(folder, _tmp_path):
    return ["bench", folder, "--ratio", "0.5", "--keep", "8"]


def no_reference(folder, _tmp_path):
    return ["check", folder]


def no_runs(folder, _tmp_path):
    return ["bench", folder, "--runs", "0"]


def unknown_flag(folder, _tmp_path):
    return ["info", folder, "--colour"]


def unknown_command(folder, _tmp_path):
    return ["dance", folder]


def misspelt_command(folder, _tmp_path):
    return ["grond", folder]


def drawing_over_the_picture(folder, tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "photo.png")
    photo = tmp_path / "photo.png"
    return ["ground", folder, photo, "the mug", "--draw", tmp_path / "link.png"]


def missing_argument(_folder, _tmp_path):
    return ["info"]


def nothing_at_all(_folder, _tmp_path):
    return []


ERRORS = [
    (missing_image, 2, "input", "nowhere.png: no such file"),
    (text_for_image, 2, "input", "notes.png: not a picture"),
    (empty_phrase, 2, "input", "the phrase is empty"),
    (long_phrase, 2, "input", "use a shorter phrase"),
    (drawing_over_the_picture, 2, "input", "link.png: is read, too, and would be"),
    (drawing_of_another_kind, 2, "input", "--draw writes .png or .jpg"),
    (unknown_ratio, 2, "config", "no ratio 0.9; have 0.5, 0.75"),
    (unknown_backend, 2, "unknown-name", "did you mean onnxruntime?"),
    (ratio_that_is_no_number, 2, "config", "'half' is no share of visual tokens to remove"),
    (percentage, 2, "config", "did you mean 0.5?"),
    (unknown_count, 2, "config", "no ratio keeps 5; have 8 of 16, 4 of 16"),
    (several_ratios, 2, "config", "'0.5,0.75' is no share"),
    (ratio_and_count, 2, "config", "not allowed with"),
    (no_runs, 2, "config", "--runs 0: at least 1"),
    (unknown_flag, 2, "config", "--colour"),
    (unknown_command, 2, "unknown-name", "unknown command 'dance'; have bench, build"),
    (misspelt_command, 2, "unknown-name", "unknown command 'grond'; did you mean ground"),
    (missing_argument, 2, "config", "BUNDLE"),
    (nothing_at_all, 2, "config", "COMMAND"),
    (missing_bundle, 4, "bundle", "nowhere: no such bundle folder"),
    (no_bundle, 4, "bundle", "it is no bundle"),
    (newer_schema, 4, "schema", "upgrade gap-runtime"),
    (changed_file, 4, "hash", "decoder.onnx: BLAKE3"),
    (no_reference, 6, "check", "no reference answers"),
]


COMMANDS = [command.__name__ for command, *_ in ERRORS]


@pytest.mark.usefixtures("picture")
@pytest.mark.parametrize(
    ("command", "code", "text"),
    [(command, code, text) for command, code, _, text in ERRORS],
    ids=COMMANDS,
)
def test_error_is_one_line_on_stderr(make_bundle, tmp_path, capsys, command, code, text):
    arguments = [str(value) for value in command(make_bundle(), tmp_path)]
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert text in errors[0]
    assert said.err.endswith(errors[0] + "\n")
    assert "Traceback" not in said.err
    if arguments[:1] != ["check"]:  # which tells of its progress before
        assert said.err.count("\n") == 1


@pytest.mark.usefixtures("picture")
@pytest.mark.parametrize(("command", "code", "kind", "text"), ERRORS, ids=COMMANDS)
def test_error_with_json_is_an_object_on_stdout(
    make_bundle, tmp_path, capsys, command, code, kind, text
):
    arguments = [str(value) for value in command(make_bundle(), tmp_path)]
    assert main([*arguments, "--json"]) == code
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert set(error) == {"kind", "message"}
    assert error["kind"] == kind
    assert text in error["message"]
    assert said.err.splitlines()[-1] == f"error: {error['message']}"


def test_a_shortened_json_flag_does_not_lose_the_error_object(tmp_path, capsys):
    main(["info", str(tmp_path / "nowhere"), "--js"])
    said = capsys.readouterr()
    # Refused or understood, but not half of each.
    assert "unrecognized arguments: --js" in said.err or said.out.startswith('{"error"')


def test_graph_that_is_none_is_a_backend_error(make_bundle, picture, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["ground", str(make_bundle()), str(picture), "the mug", "--json"]) == 5
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["kind"] == "engine"
    assert "vision-8.onnx" in said.err
    assert said.err.count("\n") == 1


def test_info_as_json_is_the_manifest(make_bundle, capsys):
    folder = make_bundle()
    assert main(["info", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((folder / "manifest.json").read_text("utf-8"))
    assert said.err == ""


def test_info_has_the_fields_that_others_rely_on(make_bundle, capsys):
    main(["info", str(make_bundle()), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["layout"]["prefix"] == 1
    assert data["ratios"][0]["patches"] == 16
    assert data["buckets"][0]["grids"] == [[4, 4]]
    assert data["layout"]["suffix"] == 7
    assert data["layout"]["answer"] == 5
    stages = [(stage["file"], stage["ratio"]) for stage in data["stages"]]
    assert stages == [("vision-8.onnx", 0.5), ("vision-4.onnx", 0.75), ("decoder.onnx", None)]
    assert data["stages"][0]["inputs"][0]["shape"] == [1, 3, 8, 8]
    assert data["stages"][0]["outputs"][0]["name"] == "visual_tokens"


def test_info_for_people_names_what_there_is(make_bundle, capsys):
    assert main(["info", str(make_bundle())]) == 0
    out = capsys.readouterr().out
    assert "tiny-8of16: llava, float32, opset 24" in out
    assert "ratio 0.5: keeps 8 of 16" in out
    assert "ratio 0.75: keeps 4 of 16" in out
    assert "vision-4.onnx" in out
    assert "5 files" in out
    assert "0 reference answers" in out


def test_info_for_people_names_buckets(make_bundle, tiled, capsys):
    assert main(["info", str(make_bundle(**tiled))]) == 0
    out = capsys.readouterr().out
    assert "ratio 0.5 (wide): keeps 7 of 14\n" in out
    assert "ratio 0.25 (tall): keeps 12 of 16\n" in out
    assert "vision-tall-12.onnx" in out


def test_info_for_people_names_extra_tokens(make_bundle, with_extra, capsys):
    assert main(["info", str(make_bundle(**with_extra))]) == 0
    out = capsys.readouterr().out
    assert "ratio 0.5: keeps 8 of 16 and 1 made of the rest\n" in out
    assert "ratio 0.75: keeps 4 of 16\n" in out


def test_picture_of_no_bucket_is_one_line_that_names_the_setting(
    make_bundle, tiled, answer_with, tmp_path, capsys
):
    answer_with(11)
    path = tmp_path / "square.png"
    Image.new("RGB", (40, 40)).save(path)
    assert main(["ground", str(make_bundle(**tiled)), str(path), "mug", "--json"]) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["kind"] == "input"
    assert "export with --set image.canvas=16x16/40:40" in error["message"]
    assert said.err.count("\n") == 1


def test_ground_of_tiles(make_bundle, tiled, picture, answer_with, capsys):
    answer_with(11)
    command = ["ground", str(make_bundle(**tiled)), str(picture), "mug", "--ratio", "0.25"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["ratio"], data["kept"], data["patches"]) == (0.25, 11, 14)
    # 40x20, and the box is of the picture, not of a square around it.
    assert data["boxes"] == [[10, 5, 30, 10]]


def test_ground_as_json(make_bundle, picture, answer_with, capsys):
    answer_with(11)
    assert main(["ground", str(make_bundle()), str(picture), "the red mug", "--json"]) == 0
    said = capsys.readouterr()
    data = json.loads(said.out)
    assert data["answer"] == "[0.25,0.25,0.75,0.50]"
    # 40x20: ten rows of padding above; 0.25 of 40 is 10.
    assert data["boxes"] == [[10, 0, 30, 10]]
    assert data["problems"] == []
    assert (data["ratio"], data["kept"], data["patches"]) == (0.5, 8, 16)
    assert data["kept_index"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert set(data["milliseconds"]) == {"preprocess", "vision", "prefill", "decode", "total"}
    assert all(value >= 0 for value in data["milliseconds"].values())
    assert said.err == ""


def test_ground_at_another_ratio(make_bundle, picture, answer_with, capsys):
    answer_with(11)
    command = ["ground", str(make_bundle()), str(picture), "mug", "--ratio", "0.75", "--json"]
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["ratio"], data["kept"]) == (0.75, 4)


def test_ground_for_people_prints_boxes_alone_on_stdout(make_bundle, picture, answer_with, capsys):
    answer_with(11)
    assert main(["ground", str(make_bundle()), str(picture), "the red mug"]) == 0
    said = capsys.readouterr()
    assert said.out == "10.0 0.0 30.0 10.0\n"
    assert "kept 8 of 16" in said.err


def test_answer_without_a_box_is_told(make_bundle, picture, answer_with, capsys):
    answer_with(8)
    assert main(["ground", str(make_bundle()), str(picture), "the red mug"]) == 7
    said = capsys.readouterr()
    assert said.out == ""
    assert "no usable box: the answer holds no box (answer: 'mug')" in said.err


def test_draw_writes_a_picture(make_bundle, picture, answer_with, tmp_path):
    answer_with(11)
    out = tmp_path / "out.png"
    assert main(["ground", str(make_bundle()), str(picture), "mug", "--draw", str(out)]) == 0
    with Image.open(out) as painted:
        assert painted.size == (480, 240)


def test_a_drawing_waits_for_no_reader_of_a_pipe(make_bundle, picture, answer_with, tmp_path):
    answer_with(11)
    out = tmp_path / "out.png"
    os.mkfifo(out)
    assert main(["ground", str(make_bundle()), str(picture), "mug", "--draw", str(out)]) == 2
    assert out.is_fifo()


def test_draw_into_a_missing_folder_is_an_input_error(
    make_bundle, picture, answer_with, tmp_path, capsys
):
    answer_with(11)
    out = tmp_path / "nowhere" / "out.png"
    command = ["ground", str(make_bundle()), str(picture), "mug", "--draw", str(out), "--json"]
    assert main(command) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "input"


@pytest.mark.parametrize("arguments", [["--help"], ["ground", "--help"], ["check", "--help"]])
def test_help_goes_to_stdout(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "exit codes: 0 done, 2 wrong setting or input" in said.out.replace("\n", " ")
    assert said.err == ""


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_import_and_help_load_no_library():
    code = """
import sys
import gap_runtime.cli.main
try:
    gap_runtime.cli.main.main(["--help"])
except SystemExit:
    pass
heavy = {"numpy", "PIL", "tokenizers", "rich", "onnxruntime"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("usage: gap-runtime")
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_exit_code_reaches_the_shell(tmp_path):
    code = "import sys; from gap_runtime.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_reader_that_has_gone_is_no_traceback(make_bundle):
    code = "import sys; from gap_runtime.cli.main import main; sys.exit(main())"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(make_bundle())],
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def test_interrupt_ends_without_a_traceback(make_bundle, monkeypatch, capsys):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gap_runtime.bundle.bundle.Bundle.open", interrupt)
    assert main(["info", str(make_bundle())]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_what_the_system_refuses_is_one_line(capsys):
    def full(_):
        raise OSError(28, "No space left on device", "/x/y")

    assert run_command(full, []) == 2
    assert capsys.readouterr().err == "error: /x/y: No space left on device\n"
    assert run_command(full, ["--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "config"
