"""What fewer bits cost in right boxes: weights in int8 and int4, and a KV cache in int8.

    python -m benchmarks.precision [--phrases 1000] [--out FILE]

The embedded models are exported in every form into build/precision, without pruning and with half
of the tokens removed under GAP positions, and asked the first held-out phrases on onnxruntime's
CPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import gap_export
from gap_runtime import evaluate
from gap_runtime.evaluation.api import Evaluation

_FOLDER: Final = Path("build/precision")
_RATIOS: Final = (0.0, 0.5)
_BACKEND: Final = "onnxruntime:cpu"
_ALL_PARTS: Final = {"quantize.vision": True}
_FORMS: Final[tuple[tuple[str, str, str, dict[str, Any]], ...]] = (
    ("float32", "-", "-", {}),
    ("int8", "nearest", "decoder, head", {}),
    ("int8", "nearest", "all three", _ALL_PARTS),
    ("int4", "awq", "decoder, head", {}),
    ("int4", "awq", "all three", _ALL_PARTS),
    ("int4", "nearest", "decoder, head", {"quantize.method": "nearest"}),
)
"""Bits, method, what is quantized, and the settings for it."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Acc@0.5 of a form of the weights, by ratio."""

    weights: str
    method: str
    quantized: str
    accuracy: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Acc@0.5 with a KV cache in float32 and in int8, and answers that have the same tokens."""

    model: str
    ratio: float
    float32: float
    int8: float
    same_tokens: int


def ask(model: str, name: str, phrases: int, **options: Any) -> Evaluation:
    """A bundle of a form, and its answers."""
    made = gap_export.export(model, ratios=list(_RATIOS), out=_FOLDER / name, **options)
    return evaluate(made.folder, f"{model}:test", _BACKEND, limit=phrases)


def find_accuracy(found: Evaluation) -> dict[str, float]:
    """By ratio."""
    return {f"{each.ratio:g}": each.accuracy for each in found.scores}


def compare_caches(model: str, full: Evaluation, phrases: int) -> list[Cache]:
    """A float32 cache's answers beside those of one in int8."""
    small = ask(model, f"{model}-cache", phrases, kv_cache="int8")
    before, now = find_accuracy(full), find_accuracy(small)
    pairs = list(zip(full.answers.rows, small.answers.rows, strict=True))
    assert all((one.key, one.ratio) == (other.key, other.ratio) for one, other in pairs)
    return [
        Cache(
            model=model,
            ratio=ratio,
            float32=before[f"{ratio:g}"],
            int8=now[f"{ratio:g}"],
            same_tokens=sum(
                one.token_ids == other.token_ids for one, other in pairs if one.ratio == ratio
            ),
        )
        for ratio in _RATIOS
    ]


def main() -> None:
    """Measure, print, and write where that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--phrases", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="a file for the figures")
    options = parser.parse_args()
    weights = []
    for bits, method, quantized, settings in _FORMS:
        name = f"refshapes-{bits}-{method}-{quantized.replace(', ', '-').replace(' ', '-')}"
        quantize = {} if bits == "float32" else {"quantize": bits}
        found = ask("refshapes", name, options.phrases, settings=settings, **quantize)
        if bits == "float32":
            full = found
        weights.append(
            Weights(
                weights=bits, method=method, quantized=quantized, accuracy=find_accuracy(found)
            )
        )
    larger = ask("refshapes-256", "refshapes-256", options.phrases)
    caches = [
        *compare_caches("refshapes", full, options.phrases),
        *compare_caches("refshapes-256", larger, options.phrases),
    ]
    figures = {
        "phrases": options.phrases,
        "weights": [asdict(each) for each in weights],
        "cache": [asdict(each) for each in caches],
    }
    said = json.dumps(figures, indent=2)
    print(said)
    if options.out is not None:
        options.out.write_text(said + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
