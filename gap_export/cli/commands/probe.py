"""`gap-export probe`: find the first tensor of a bundle that is not finite."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from gap_runtime.cli.options import add_bundle, add_count, open_bundle, print_json
from gap_runtime.errors import CheckError, ConfigError

SUMMARY: Final = "find the first tensor of a bundle that is not finite (float16 overflows)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    add_count(parser)
    parser.add_argument(
        "--image", metavar="FILE", help="picture to ask about (default: the recorded samples)"
    )
    parser.add_argument("--phrase", help="what to look for in it")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_export.pipeline.nonfinite import Probed  # noqa: PLC0415 - loads onnx

    return {"--json": Probed}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    if (options.image is None) != (options.phrase is None):
        raise ConfigError("--image and --phrase go together; give both or neither")
    from gap_export.pipeline.nonfinite import Probed, find_bad_tensor  # noqa: PLC0415 - onnx
    from gap_runtime.display import Display  # noqa: PLC0415
    from gap_runtime.pictures.load import find_bucket, load_picture  # noqa: PLC0415
    from gap_runtime.records import dump_record  # noqa: PLC0415

    bundle = open_bundle(options)
    manifest = bundle.manifest
    found = None
    questions = _questions(options, bundle)
    count = Display().count("looking at every tensor", "questions", len(questions))
    with count as pace:
        for image, phrase in questions:
            picture = load_picture(image)
            bucket = find_bucket(picture.size, manifest.preprocess, manifest.buckets)
            entry = bundle.choose_ratio(options.ratio, bucket.name, keep=options.keep)
            found = find_bad_tensor(bundle, picture, phrase, entry)
            if found is not None:
                break
            pace(1)
    if options.json:
        print_json(dump_record(Probed(bad=found)))
    if found is not None:
        print(
            f"error: {found} is not finite in {manifest.dtype}; export with --dtype bfloat16 or "
            "float32",
            file=sys.stderr,
        )
        return CheckError.exit_code
    if not options.json:
        print("all tensors are finite")
    return 0


def _questions(options: argparse.Namespace, bundle: Any) -> list[tuple[str, str]]:
    """Pictures and phrases: those given, or the ones that the bundle brings."""
    if options.image is not None:
        return [(options.image, options.phrase)]
    reference = bundle.manifest.reference
    if reference is None:
        raise ConfigError(f"{bundle.folder}: no sample pictures in it; give --image and --phrase")
    asked = {(sample.image, sample.phrase) for sample in reference.samples}
    return [(str(bundle.folder / image), phrase) for image, phrase in sorted(asked)]
