"""`gap-runtime build`: compile a bundle's graphs to engines for a machine."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gap_runtime.cli.options import add_bundle, add_chosen_counts, open_bundle, print_json
from gap_runtime.errors import ConfigError
from gap_runtime.machines.target import list_targets, load_target

if TYPE_CHECKING:
    from gap_runtime.bundle.bundle import Bundle
    from gap_runtime.bundle.engines import BuildReport, BuildRequest
    from gap_runtime.machines.target import Target

SUMMARY: Final = "compile a bundle's graphs to engines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_bundle(parser)
    parser.add_argument(
        "--target",
        metavar="NAME",
        help=f"kind of machine (default: the bundle's own): {', '.join(list_targets())}",
    )
    add_chosen_counts(parser)
    parser.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        metavar="8.9",
        help="of the GPU to build for, may be given several times; tensorrt-rtx only "
        "(default: this machine's GPU)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="keep measured timings there (default: in the user's cache folder)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the backend: tensorrt.package=tensorrt_rtx",
    )
    parser.add_argument("--force", action="store_true", help="build engines anew that are good")


def json_types() -> dict[str, Any]:
    """By what decides it, the type of what `--json` prints."""
    from gap_runtime.bundle.engines import BuildReport  # noqa: PLC0415

    return {"--json": BuildReport}


def run(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from gap_runtime.backends import open_backend  # noqa: PLC0415
    from gap_runtime.display import Display  # noqa: PLC0415 - libraries only when a command runs
    from gap_runtime.records import dump_record  # noqa: PLC0415

    bundle = open_bundle(options)
    target = _find_target(options.target, bundle)
    request = _read_request(options, bundle, target)
    backend, _ = open_backend(target.backend)
    build = getattr(backend, "build", None)
    if build is None:
        named = [name for name in list_targets() if _builds(load_target(name))]
        raise ConfigError(
            f"target '{target.name}' runs the graphs as they are with {target.backend}, there is "
            f"nothing to build; to build engines, name one of --target {', '.join(named)}"
        )
    report: BuildReport = build(bundle, request, Display())
    if options.json:
        print_json(dump_record(report))
    else:
        _show(report)
    return 0


def _builds(target: Target) -> bool:
    from gap_runtime.backends import open_backend  # noqa: PLC0415

    return hasattr(open_backend(target.backend)[0], "build")


def _find_target(name: str | None, bundle: Bundle) -> Target:
    """The target that is asked for; the bundle's own as it was when the bundle was made."""
    own = bundle.manifest.target
    return own if name is None or name == own.name else load_target(name)


def _read_request(options: argparse.Namespace, bundle: Bundle, target: Target) -> BuildRequest:
    from gap_runtime.bundle.engines import BuildRequest  # noqa: PLC0415

    wanted = bundle.choose_ratios(options.ratios, options.keep)
    entries = tuple(entry for entry in bundle.manifest.ratios if entry.ratio in wanted)
    for capability in options.compute_capability:
        if not re.fullmatch(r"\d+\.\d", capability):
            raise ConfigError(
                f"--compute-capability {capability}: expected major.minor, for example 8.9"
            )
    timing_cache: Path | None = options.timing_cache
    if timing_cache is not None and not timing_cache.parent.is_dir():
        raise ConfigError(f"--timing-cache {timing_cache}: its folder does not exist; make it")
    return BuildRequest(
        target=target,
        entries=entries,
        compute_capabilities=tuple(dict.fromkeys(options.compute_capability)),
        timing_cache=timing_cache,
        options=_read_settings(options.set, target.backend),
        is_forced=options.force,
    )


def _read_settings(settings: list[str], backend: str) -> dict[str, str]:
    """The backend's settings, without its name and the dot."""
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        owner, _, name = key.partition(".")
        if not (equals and name and value):
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, as {backend}.package=NAME")
        if owner != backend:
            raise ConfigError(f"--set {setting}: the target's backend is {backend}")
        found[name] = value
    return found


def _show(report: BuildReport) -> None:
    """The engines as lines."""
    from gap_runtime.display import format_bytes  # noqa: PLC0415

    capabilities = ", ".join(report.compute_capabilities)
    print(
        f"{report.folder}: {report.package} {report.version} for compute capability {capabilities}"
    )
    for engine in report.engines:
        record: Any = engine.record
        how = "was there" if engine.is_reused else f"built in {record.build_seconds:.1f} s"
        scratch = (
            ""
            if record.device_memory_bytes is None
            else f", {format_bytes(record.device_memory_bytes)} of scratch memory"
        )
        print(f"{record.stage}: {format_bytes(record.size)}{scratch}, {how}")
