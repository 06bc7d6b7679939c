"""`optimum-cli export gap` is a door to the same pipeline."""

import json
import subprocess
import sys
from pathlib import Path

CLI = Path(sys.executable).with_name("optimum-cli")


def test_optimum_cli_exports_a_bundle(tmp_path):
    out = tmp_path / "bundle"
    command = [CLI, "export", "gap", "--model", "refshapes", "--ratio", "0.75", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["ratios"] == [
        {"ratio": 0.75, "bucket": "", "patches": 64, "kept": 16, "extra": 0}
    ]
    assert manifest["reference"] is not None


def test_optimum_cli_gives_the_same_error_and_exit_code(tmp_path):
    command = [CLI, "export", "gap", "--model", "refshapes", "--ratio", "1.5", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "ratio 1.5 is outside [0, 1)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
