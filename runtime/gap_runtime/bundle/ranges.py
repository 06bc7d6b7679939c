"""What the values of a manifest may be, each on its own: names, sizes, shares, patterns.

Whether they fit each other and the graphs is asked in `bundle.validation`. A value that nothing
could mean is refused here, so that nobody behind has to think of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

from gap_runtime.bundle.layout import is_ratio
from gap_runtime.bundle.manifest import DECODER, Manifest, ReferenceSample, Stage
from gap_runtime.bundle.tensors import FREE_LOGITS, FREE_ROWS
from gap_runtime.pictures.boxes import BoxFormat, find_attempts
from gap_runtime.records.patterns import LONGEST_PATTERN, count_groups

_FREE: Final = (FREE_ROWS, FREE_LOGITS)
"""What a size of a shape may be called that no export fixes."""
_LONGEST_STRIP: Final = 1024
_MOST: Final = 2**31
"""Above any count of tokens, rows or pixels."""
_LONGEST_NAME: Final = 200
_LONGEST_ANSWER: Final = 10_000
_LONGEST_LINE: Final = 1000
"""Characters of an answer, of a template or a phrase too, and of what is said to people."""
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_PHRASE: Final = "{phrase}"
_IMAGE: Final = "<image>"


class _Claim(NamedTuple):
    """Something of a manifest that has to hold."""

    place: str
    value: Any
    holds: bool
    expected: str


def find_absurd_value(manifest: Manifest) -> str | None:
    """The first value that nothing could mean, in words; None where there is none."""
    for claim in _list_claims(manifest):
        if not claim.holds:
            return f"{claim.place} is {claim.value!r:.60}, expected {claim.expected}"
    return None


def is_plain_name(name: str) -> bool:
    """Whether a text can be the name of one file or folder, in the place where it is put."""
    return (
        0 < len(name) <= _LONGEST_NAME
        and name.isprintable()
        and name not in {".", ".."}
        and not set(name) & set("/\\")
    )


def _list_claims(manifest: Manifest) -> Iterator[_Claim]:
    name = "a name without / and \\"
    yield _Claim("name", manifest.name, is_plain_name(manifest.name), name)
    yield _Claim("family", manifest.family, is_plain_name(manifest.family), name)
    yield from _list_claims_of_origin(manifest)
    for file, entry in manifest.files.items():
        yield _Claim("files", file, _is_inside(file), "a path inside the bundle")
        yield _Claim(f"files.{file}.size", entry.size, entry.size >= 0, "bytes")
        yield _Claim(f"files.{file}.blake3", entry.blake3, _is_hash(entry.blake3), "a BLAKE3")
    for k, stage in enumerate(manifest.stages):
        yield from _list_claims_of_stage(f"stages[{k}]", stage)
    names = [stage.name for stage in manifest.stages]
    yield _Claim("stages", names, len(set(names)) == len(names), "a name of its own for each")
    yield from _list_claims_of_target(manifest)
    yield from _list_claims_of_counts(manifest)
    yield from _list_claims_of_pictures(manifest)
    yield from _list_claims_of_box(manifest.box)
    if manifest.reference is not None:
        keys = [sample.key for sample in manifest.reference.samples]
        usable = len(set(keys)) == len(keys) > 0
        yield _Claim("reference.samples", keys, usable, "one or more, with distinct keys")
        for k, sample in enumerate(manifest.reference.samples):
            yield from _list_claims_of_sample(f"reference.samples[{k}]", sample, manifest)


def _list_claims_of_origin(manifest: Manifest) -> Iterator[_Claim]:
    source, pruning, line = manifest.source, manifest.pruning, f"a line of {_LONGEST_LINE:,}"
    yield _Claim("source.checkpoint", source.checkpoint, _is_line(source.checkpoint), line)
    usable = source.revision is None or _is_line(source.revision)
    yield _Claim("source.revision", source.revision, usable, f"{line}, or null")
    digits = source.index_sha256
    yield _Claim("source.index_sha256", digits, _is_hash(digits), "64 hexadecimal digits")
    for package, version in manifest.versions.items():
        usable = is_plain_name(package) and is_plain_name(version)
        yield _Claim(f"versions.{package}", version, usable, "a version")
    usable = is_plain_name(pruning.strategy)
    yield _Claim("pruning.strategy", pruning.strategy, usable, "a plain name")
    yield _Claim("pruning.seed", pruning.seed, 0 <= pruning.seed < _MOST, "a seed")


def _list_claims_of_stage(place: str, stage: Stage) -> Iterator[_Claim]:
    yield _Claim(f"{place}.name", stage.name, is_plain_name(stage.name), "a plain name")
    for side in (stage.inputs, stage.outputs):
        names = [tensor.name for tensor in side]
        usable = len(set(names)) == len(names) and all(map(is_plain_name, names))
        yield _Claim(f"{place}: tensors", names, usable, "a plain name of its own for each")
    for tensor in (*stage.inputs, *stage.outputs):
        usable = all(
            size in _FREE if isinstance(size, str) else 0 < size < _MOST for size in tensor.shape
        )
        expected = f"sizes above 0, {' or '.join(_FREE)}"
        yield _Claim(f"{place}: shape of {tensor.name}", tensor.shape, usable, expected)
        usable = _is_line(tensor.meaning)
        yield _Claim(f"{place}: meaning of {tensor.name}", tensor.meaning, usable, "a line")


def _list_claims_of_target(manifest: Manifest) -> Iterator[_Claim]:
    target = manifest.target
    for field in ("name", "backend", "dialect"):
        value = getattr(target, field)
        yield _Claim(f"target.{field}", value, is_plain_name(value), "a plain name")
    provider, line = target.provider, _is_line(target.description)
    usable = provider is None or is_plain_name(provider)
    yield _Claim("target.provider", provider, usable, "a plain name, or null")
    yield _Claim("target.description", target.description, line, "a line")
    yield _Claim("target.opset", target.opset, 1 <= target.opset <= 1000, "an opset of ONNX")
    yield _Claim("target.block", target.block, 0 < target.block < _MOST, "a count of inputs")
    for package, versions in target.packages.items():
        usable = is_plain_name(package) and is_plain_name(versions)
        yield _Claim(f"target.packages.{package}", versions, usable, "versions of a package")
    for field in ("workspace_mib", "memory_mib"):
        value = getattr(target, field)
        usable = value is None or 0 < value < _MOST
        yield _Claim(f"target.{field}", value, usable, "MiB above 0, or null")
    for each in target.compute_capabilities:
        usable = re.fullmatch(r"\d{1,3}\.\d", each) is not None
        yield _Claim("target.compute_capabilities", each, usable, "numbers as 8.9")


def _list_claims_of_counts(manifest: Manifest) -> Iterator[_Claim]:
    layout, cache = manifest.layout, manifest.cache
    for field, least in (("prefix", 0), ("suffix", 0), ("answer", 1), ("capacity", 1)):
        value = getattr(layout, field)
        yield _Claim(f"layout.{field}", value, least <= value < _MOST, f"{least} or more")
    for field in ("layers", "heads", "head_dim"):
        value = getattr(cache, field)
        yield _Claim(f"cache.{field}", value, 0 < value < _MOST, "1 or more")
    for k, entry in enumerate(manifest.ratios):
        yield _Claim(f"ratios[{k}].ratio", entry.ratio, is_ratio(entry.ratio), "a share in [0, 1)")
    pairs = [(entry.ratio, entry.bucket) for entry in manifest.ratios]
    yield _Claim("ratios", pairs, len(set(pairs)) == len(pairs), "each ratio once in a bucket")
    shape = manifest.embedding.shape
    usable = len(shape) == 2 and all(0 < size < _MOST for size in shape)
    yield _Claim("embedding.shape", shape, usable, "rows and width")
    stop_ids = manifest.prompt.stop_ids
    yield _Claim("prompt.stop_ids", stop_ids, _are_ids(stop_ids, _MOST), "tokens")
    if manifest.phrase is not None:
        length, end_id = manifest.phrase.length, manifest.phrase.end_id
        yield _Claim("phrase.length", length, 0 <= length < _MOST, "a count of tokens")
        yield _Claim("phrase.end_id", end_id, 0 <= end_id < _MOST, "a token")


def _list_claims_of_pictures(manifest: Manifest) -> Iterator[_Claim]:
    spec, prompt = manifest.preprocess, manifest.prompt
    for k, bucket in enumerate(manifest.buckets):
        usable = bucket.name == "" or is_plain_name(bucket.name)
        yield _Claim(f"buckets[{k}].name", bucket.name, usable, "a plain name, or none")
        usable = 0 < bucket.strip <= _LONGEST_STRIP
        yield _Claim(f"buckets[{k}].strip", bucket.strip, usable, "a count of patches")
    yield _Claim("preprocess.side", spec.side, 0 < spec.side < 100_000, "pixels")
    yield _Claim("preprocess.fill", spec.fill, _within(spec.fill, 0, 255), "values of 8 bits")
    yield _Claim("preprocess.mean", spec.mean, _within(spec.mean, -10, 10), "a mean of pixels")
    yield _Claim("preprocess.std", spec.std, _within(spec.std, 1e-3, 10), "a deviation of pixels")
    if prompt.tokenizer is not None:
        usable = prompt.image_token is None or _is_line(prompt.image_token)
        yield _Claim("prompt.image_token", prompt.image_token, usable, "a token, or null")
        template, image = prompt.template, prompt.image_token or _IMAGE
        usable = len(template) <= _LONGEST_ANSWER
        yield _Claim(
            "prompt.template", template, usable, f"at most {_LONGEST_ANSWER:,} characters"
        )
        yield _Claim("prompt.template", template, _PHRASE in template, f"{_PHRASE} in it")
        yield _Claim("prompt.template", template, template.count(image) == 1, f"{image} once")


def _list_claims_of_box(box: BoxFormat) -> Iterator[_Claim]:
    yield _Claim("box.scale", box.scale, 0 < box.scale < _MOST, "a scale above 0")
    for field in ("attempt", "pattern"):
        value = getattr(box, field)
        usable = count_groups(value) is not None
        yield _Claim(f"box.{field}", value, usable, "a regular expression")
    # Drafts of any form are verified, so that one of no box costs time alone.
    form = box.form
    usable = form is None or (len(form) <= LONGEST_PATTERN and "#" in form)
    yield _Claim("box.form", form, usable, "text with # for digits, or null")


def _list_claims_of_sample(
    place: str, sample: ReferenceSample, manifest: Manifest
) -> Iterator[_Claim]:
    rows, logits = manifest.embedding.shape[0], count_logits(manifest)
    entries = {(each.ratio, each.bucket): each.kept for each in manifest.ratios}
    buckets = {bucket.name: bucket.patches for bucket in manifest.buckets}
    kept = (
        buckets.get(sample.bucket)
        if sample.ratio is None
        else entries.get((sample.ratio, sample.bucket))
    )
    wanted = "the kept count of one of the ratios" if kept is None else f"{kept} at its ratio"
    yield _Claim(f"{place}.kept", sample.kept, sample.kept == kept, wanted)
    name, layout = sample.sample, manifest.layout
    yield _Claim(f"{place}.sample", name, is_plain_name(name), "a plain name")
    usable = sample.key.startswith(f"{name}/") and is_plain_name(sample.key[len(name) + 1 :])
    yield _Claim(f"{place}.key", sample.key, usable, f"a name behind {name}/")
    usable = 0 < len(sample.phrase.strip()) <= _LONGEST_ANSWER
    yield _Claim(f"{place}.phrase", sample.phrase, usable, "a phrase")
    ids = sample.token_ids
    usable = _are_ids(ids, logits) and len(ids) <= layout.answer
    yield _Claim(f"{place}.token_ids", ids, usable, "tokens of the model, an answer of them")
    count = len(sample.prompt_ids)
    usable = _are_ids(sample.prompt_ids, rows) and 0 < count <= layout.prefix + layout.suffix
    yield _Claim(f"{place}.prompt_ids", sample.prompt_ids, usable, "tokens of the model")
    margins = sample.token_margins
    usable = _within(margins, 0, 2) and len(margins) in {len(ids), len(ids) + 1}
    yield _Claim(f"{place}.token_margins", margins, usable, "one from 0 on for each token")
    for box in sample.boxes:
        usable = 0 <= box.x0 < box.x1 < _MOST and 0 <= box.y0 < box.y1 < _MOST
        yield _Claim(f"{place}.boxes", tuple(box), usable, "corners inside a picture")
    answer = sample.answer
    usable = len(answer) <= _LONGEST_ANSWER
    yield _Claim(f"{place}.answer", answer, usable, f"at most {_LONGEST_ANSWER:,} characters")
    found = sum(each.values is not None for each in find_attempts(answer, manifest.box))
    yield _Claim(
        f"{place}.boxes", len(sample.boxes), len(sample.boxes) <= found, "those of its answer"
    )


def count_logits(manifest: Manifest) -> int:
    """Tokens that the decoder may give; without such an output, none."""
    for tensor in manifest.stage(DECODER).outputs:
        if tensor.name == "logits" and tensor.shape and isinstance(tensor.shape[-1], int):
            return tensor.shape[-1]
    return 0


def _is_line(text: str) -> bool:
    """Whether a text is a line for people."""
    return 0 < len(text) <= _LONGEST_LINE and all(c.isprintable() or c == "\u00a0" for c in text)


def _are_ids(ids: Iterable[int], rows: int) -> bool:
    return all(0 <= each < rows for each in ids)


def _within(values: Iterable[float], least: float, most: float) -> bool:
    return all(math.isfinite(each) and least <= each <= most for each in values)


def _is_hash(text: str) -> bool:
    return _HASH.fullmatch(text) is not None


def _is_inside(file: str) -> bool:
    """Whether a path has no way out of the folder that it is joined to."""
    parts = PurePosixPath(file).parts
    return bool(parts) and not file.startswith("/") and all(map(is_plain_name, parts))
