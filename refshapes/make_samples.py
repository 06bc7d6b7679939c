"""Write the sample pictures of both data sets: three scenes of a test split, a phrase each.

python refshapes/make_samples.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from gap_runtime.evaluation import refshapes, refshapes256

# (index in the test split, question): a square, a wide and a tall picture.
CHOSEN: Final = ((6, 1), (8, 0), (4, 1))
CHOSEN_256: Final = ((27, 0), (22, 1), (56, 4))


def main() -> None:
    """Draw the scenes of both sets."""
    home = Path(__file__).parent
    write(home / "samples", refshapes.draw_scene, CHOSEN)
    write(home / "samples-256", refshapes256.draw_scene, CHOSEN_256)


def write(
    home: Path, draw: Callable[[str, int], Any], chosen: tuple[tuple[int, int], ...]
) -> None:
    """Draw scenes and list them in samples.json."""
    home.mkdir(exist_ok=True)
    entries = []
    for index, asked in chosen:
        scene = draw("test", index)
        name = f"test-{index:03d}.png"
        scene.image.save(home / name)
        question = scene.questions[asked]
        entries.append({"image": name, "phrase": question.phrase, "box": list(question.box)})
    (home / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
