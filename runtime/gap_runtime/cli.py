"""The `gap-runtime` command. Results on stdout, everything for people on stderr."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gap_runtime.errors import CheckError, ConfigError, GapError, InputError

if TYPE_CHECKING:
    from gap_runtime.bundle import Bundle
    from gap_runtime.display import Display

_EPILOG = (
    "exit codes: 0 done, 2 wrong setting or input, 4 bad bundle, 5 backend failed, 6 check failed"
)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors that `--json` can carry."""

    def error(self, message: str) -> NoReturn:
        """Turn a usage error into a ConfigError; `run_command` prints it."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    """Run a command line; turn a GapError into its line, its JSON and its exit code.

    The one place of both distributions where GapError is caught.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            code = main(arguments)
        except GapError as error:
            if "--json" in arguments:
                print(json.dumps({"error": {"kind": error.kind, "message": str(error)}}))
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        # Here, not at exit, where a reader that has gone could not be dealt with.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `gap-runtime`."""
    return run_command(_main, arguments)


def print_json(data: Any) -> None:
    """A result for programs, on stdout; JSON has no infinity, so that becomes null."""
    print(json.dumps(_finite(data), indent=2, sort_keys=True, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gap-runtime",
        allow_abbrev=False,
        description="run and check bundles that gap-export made; needs no torch",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=metadata.version("gap-runtime"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=ArgumentParser)

    ground = _add_command(commands, "ground", _ground, "say where a phrase is in a picture")
    ground.add_argument("image", metavar="IMAGE", help="picture file")
    ground.add_argument("phrase", metavar="PHRASE", help="what to look for: 'the red mug'")
    ground.add_argument("--ratio", type=float, help="one of the bundle's ratios (default: first)")
    ground.add_argument("--draw", metavar="OUT.png", type=Path, help="paint the result")
    _add_backend(ground)

    check = _add_command(commands, "check", _check, "compare with PyTorch's recorded answers")
    _add_backend(check)
    _add_command(commands, "info", _info, "show what a bundle holds")
    bench = _add_command(commands, "bench", _bench, "time every stage at every ratio")
    bench.add_argument("--runs", type=int, default=7, help="timed runs per ratio (default 7)")
    _add_backend(bench)
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        metavar="NAME",
        help="onnxruntime, onnxruntime:cpu or onnxruntime:cuda (default: onnxruntime)",
    )


def _open(options: argparse.Namespace, *, verify_all: bool = False) -> Bundle:
    from gap_runtime.bundle import Bundle  # noqa: PLC0415 - numpy only when a command runs

    return Bundle.open(options.bundle, verify_all=verify_all)


def _ground(options: argparse.Namespace) -> int:
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.grounder import Grounder  # noqa: PLC0415
    from gap_runtime.image import load_picture  # noqa: PLC0415

    picture = load_picture(options.image)
    bundle = _open(options)
    if options.draw is not None and options.draw.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise InputError(f"{options.draw}: --draw writes .png or .jpg files")
    grounding = Grounder(bundle, options.backend, ratio=options.ratio).ground(
        picture, options.phrase
    )
    if options.draw is not None:
        _draw(options.draw, picture, bundle, grounding)
    if options.json:
        print_json(
            {
                "answer": grounding.answer,
                "boxes": [box.as_list() for box in grounding.boxes],
                "problems": list(grounding.problems),
                "phrase": grounding.phrase,
                "ratio": grounding.ratio,
                "kept": grounding.kept,
                "patches": grounding.patches,
                "kept_index": list(grounding.kept_index),
                "milliseconds": grounding.milliseconds,
            }
        )
        return 0
    for box in grounding.boxes:
        print(" ".join(f"{value:.1f}" for value in box.as_list()))
    display = Display()
    for problem in grounding.problems:
        display.say(f"no usable box: {problem} (answer: {grounding.answer!r})")
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in grounding.milliseconds.items())
    display.say(f"{grounding.answer}  kept {grounding.kept} of {grounding.patches}; {times}")
    return 0


def _draw(path: Path, picture: Any, bundle: Bundle, grounding: Any) -> None:
    from gap_runtime.drawing import draw_grounding  # noqa: PLC0415

    painted = draw_grounding(
        picture,
        bundle.manifest,
        phrase=grounding.phrase,
        boxes=grounding.boxes,
        kept_index=grounding.kept_index,
    )
    try:
        painted.save(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _check(options: argparse.Namespace) -> int:
    from gap_runtime.check import check_bundle  # noqa: PLC0415
    from gap_runtime.display import Display  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    display = Display()
    with display.step("checking files"):
        bundle = _open(options, verify_all=True)
    with display.step("comparing with PyTorch's answers"):
        report = check_bundle(bundle, options.backend)
    if options.json:
        print_json(dump_record(report))
    else:
        show_check(display, report)
        print("passed" if report.passed else "failed")
    if not report.passed:
        failed = [row for row in report.rows if not row.passed]
        message = (
            f"{len(failed)} of {len(report.rows)} rows differ from PyTorch; first: "
            f"{failed[0].sample} at ratio {failed[0].ratio:g}: {'; '.join(failed[0].reasons)}"
        )
        print(f"error: {message}", file=sys.stderr)
        return CheckError.exit_code
    return 0


def show_check(display: Display, report: Any) -> None:
    """The rows of a check as a table."""
    display.table(
        f"{report.dtype} on {report.backend} against PyTorch",
        ["ratio", "sample", "kept", "positions", "logits", "tokens", "IoU", "result"],
        [
            [
                row.ratio,
                row.sample,
                "equal" if row.kept_equal else f"Jaccard {row.kept_jaccard:.3f}",
                "equal" if row.positions_equal else "differ",
                f"{row.max_logit_error:.1e}",
                "same" if row.same_tokens else f"part at {row.first_divergence}",
                "-" if row.iou is None else f"{row.iou:.3f}",
                "passed" if row.passed else "; ".join(row.reasons),
            ]
            for row in report.rows
        ],
    )


def _info(options: argparse.Namespace) -> int:
    bundle = _open(options)
    manifest = bundle.manifest
    if options.json:
        print_json(manifest.dump())
        return 0
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    layout = manifest.layout
    print(f"{manifest.name}: {manifest.family}, {manifest.dtype}, opset {manifest.opset}")
    print(f"pruner {manifest.pruning.strategy}, positions {manifest.pruning.positions}")
    print(
        f"prompt: {layout.prefix} text + visual + up to {layout.suffix} text, "
        f"answer up to {layout.answer}; cache {layout.capacity} slots"
    )
    for entry in manifest.ratios:
        extra = f" and {entry.extra} made of the rest" if entry.extra else ""
        bucket = f" ({entry.bucket})" if entry.bucket else ""
        print(f"ratio {entry.ratio:g}{bucket}: keeps {entry.kept} of {entry.patches}{extra}")
    for stage in manifest.stages:
        print(f"stage {stage.file}")
        for label, specs in (("in ", stage.inputs), ("out", stage.outputs)):
            for spec in specs[:6]:
                shape = ", ".join(map(str, spec.shape))
                print(f"  {label} {spec.name} {spec.dtype} [{shape}]  {spec.meaning}")
            if len(specs) > 6:
                print(f"  {label} ... {len(specs) - 6} more of the KV cache")
    total = sum(entry.size for entry in manifest.files.values())
    print(f"{len(manifest.files)} files, {format_bytes(total)}")
    answers = len(manifest.reference.samples) if manifest.reference else 0
    print(f"{answers} reference answers")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from gap_runtime.bench import bench_bundle  # noqa: PLC0415
    from gap_runtime.display import Display  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    if options.runs < 1:
        raise ConfigError(f"--runs {options.runs}: at least 1 is needed")
    display = Display()
    with display.step("timing"):
        report = bench_bundle(_open(options), options.backend, runs=options.runs)
    if options.json:
        print_json(dump_record(report))
        return 0
    for row in report.rows:
        bucket = f"{row.bucket}, " if row.bucket else ""
        print(
            f"ratio {row.ratio:g} ({bucket}{row.kept} of {row.patches}): "
            f"vision {row.vision_ms:.1f} ms, prefill of {row.prompt} {row.prefill_ms:.1f} ms, "
            f"token {row.token_ms:.2f} ms ({row.tokens_per_second:.0f}/s)"
        )
    return 0
