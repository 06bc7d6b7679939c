"""The card of a bundle on the hub, made from its manifest: what it is, and how well it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.hub import HubName
from gap_runtime.bundle.hub_library import load_library
from gap_runtime.bundle.license import UNKNOWN, License
from gap_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from gap_runtime.display import format_bytes
from gap_runtime.errors import ConfigError, show_line
from gap_runtime.grounding.check import CheckReport
from gap_runtime.records.plain import read_json

_POSITIONS: Final = {
    "gap": "the position IDs from before pruning (GAP), so every patch is still where it was",
    "compact": "position IDs counted anew without gaps; an ablation, which loses most boxes",
}


def make_card(
    bundle: Bundle,
    name: HubName,
    license: License,  # noqa: A002 - the field's word
    report: CheckReport | None,
    accuracy: dict[str, Any] | None = None,
) -> str:
    """The card, Markdown with the hub's metadata in front.

    Args:
        bundle: To be pushed.
        name: Where to.
        license: Of the source.
        report: Its comparison with PyTorch, where it was made.
        accuracy: As `read_accuracy` gives it, where it was measured.
    """
    manifest = bundle.manifest
    source = manifest.source
    on_hub = source.checkpoint.count("/") == 1
    data = load_library().ModelCardData(
        license=None if license.name == UNKNOWN else license.name,
        library_name="gap-export",
        pipeline_tag="zero-shot-object-detection",
        tags=["onnx", "visual-grounding", "token-pruning", manifest.family],
        base_model=source.checkpoint if on_hub else None,
    )
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {_plain(manifest.name)}\n",
            (
                f"{_plain(source.checkpoint)} as ONNX graphs that find what a phrase means in a "
                "picture and give its box. A fixed share of the visual tokens is removed inside "
                f"the graph; those that stay have {_describe_positions(manifest)}. Made by "
                "gap-export; it runs without torch.\n"
            ),
            (
                "```\npip install 'gap-runtime[cpu,hub]'\n"
                f'gap-runtime ground hub:{name} photo.jpg "the red mug"\n```\n'
            ),
            *_list_facts(manifest, license),
            *_list_ratios(manifest),
            *_list_parity(report),
            *_list_accuracy(accuracy),
            "## Files\n",
            (
                f"{len(manifest.files)} files, "
                f"{format_bytes(sum(entry.size for entry in manifest.files.values()))}; "
                f"`{MANIFEST_FILE}` has the BLAKE3 of each, and `gap-runtime pull` compares "
                "them.\n"
            ),
        ]
    )


def _plain(text: str) -> str:
    """A text from a file as one line without marks of Markdown or HTML."""
    return "".join(f"\\{each}" if each in "|`*_<>[]#" else each for each in show_line(text))


def _describe_positions(manifest: Manifest) -> str:
    mode = manifest.pruning.positions
    return _POSITIONS.get(mode, f"position IDs of the ablation `{mode}`")


def _list_facts(manifest: Manifest, license: License) -> list[str]:  # noqa: A002
    source, fewer = manifest.source, manifest.quantization
    revision = f" at `{_plain(source.revision)}`" if source.revision else ""
    weights = manifest.dtype if fewer is None else f"{fewer.weights} by {fewer.method}"
    rows = [
        ("made from", _plain(source.checkpoint) + revision),
        ("licence of that", license.name if license.name != UNKNOWN else "**unknown**"),
        ("family", manifest.family),
        ("pruner", _plain(manifest.pruning.strategy)),
        ("positions", manifest.pruning.positions),
        ("weights", weights),
        ("made for", f"{manifest.target.name}, opset {manifest.target.opset}"),
        ("made by", ", ".join(f"{key} {value}" for key, value in manifest.versions.items())),
    ]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]


def _list_ratios(manifest: Manifest) -> list[str]:
    rows = [
        f"| {entry.ratio:g} | {entry.kept} of {entry.patches} | {_plain(entry.bucket) or 'all'} |"
        for entry in manifest.ratios
    ]
    return [
        "## Ratios\n",
        "| removed | visual tokens kept | pictures |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _list_parity(report: CheckReport | None) -> list[str]:
    """How many answers are PyTorch's, by ratio."""
    if report is None:
        return ["## Beside PyTorch\n", "Not compared when it was pushed: `gap-runtime check`.\n"]
    rows = []
    for ratio in dict.fromkeys(row.ratio for row in report.rows):
        group = [row for row in report.rows if row.ratio == ratio]
        same = sum(row.same_tokens for row in group)
        kept = sum(row.kept_equal for row in group)
        error = max(row.relative_logit_error or 0.0 for row in group)
        rows.append(
            f"| {ratio:g} | {same} of {len(group)} | {kept} of {len(group)} | {error:.1e} |"
        )
    return [
        "## Beside PyTorch\n",
        (
            f"The same questions to the original model in PyTorch, {report.precision} on "
            f"{report.backend}.\n"
        ),
        "| removed | same answers | same tokens kept | largest relative logit error |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _list_accuracy(accuracy: dict[str, Any] | None) -> list[str]:
    if accuracy is None:
        return ["## Accuracy\n", "Not measured when it was pushed.\n"]
    rows = [
        f"| {score['ratio']:g} | {score['protocol']} | {score['phrases']} | "
        f"{score['accuracy']:.1%} | {score['low']:.1%} to {score['high']:.1%} |"
        for score in accuracy["scores"]
    ]
    return [
        "## Accuracy\n",
        f"On {_plain(accuracy['data']['name'])}, by `gap-runtime evaluate`.\n",
        "| removed | protocol | phrases | accuracy | 95 % interval |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def read_accuracy(path: Path, bundle: Bundle) -> dict[str, Any]:
    """What `gap-runtime evaluate --json` printed of this bundle.

    Raises:
        ConfigError: It is no such file, or of another bundle.
    """
    data = read_json(path, ConfigError, advice="give what gap-runtime evaluate --json printed")
    wanted: dict[str, tuple[type, ...]] = {"protocol": (str,), "phrases": (int,)}
    wanted |= dict.fromkeys(("ratio", "accuracy", "low", "high"), (int, float))
    try:
        of, name, scores = data["subject"]["sha256"], data["data"]["name"], data["scores"]
        fits = isinstance(name, str) and all(
            isinstance(score[key], kinds) for score in scores for key, kinds in wanted.items()
        )
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise ConfigError(f"{path}: not what gap-runtime evaluate --json prints")
    if of != bundle.hash_manifest():
        raise ConfigError(f"{path}: measured with another bundle than {bundle.folder}")
    found: dict[str, Any] = data
    return found
