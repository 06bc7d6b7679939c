"""Write the packaged sample pictures: three scenes of the test split with one phrase each.

python refshapes/make_samples.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from gap_runtime.evaluation.refshapes import draw_scene

# (index in the test split, question): a square, a wide and a tall picture.
CHOSEN: Final = ((6, 1), (8, 0), (4, 1))


def main() -> None:
    """Draw the scenes and list them in samples.json."""
    home = Path(__file__).with_name("samples")
    home.mkdir(exist_ok=True)
    entries = []
    for index, asked in CHOSEN:
        scene = draw_scene("test", index)
        name = f"test-{index:03d}.png"
        scene.image.save(home / name)
        question = scene.questions[asked]
        entries.append({"image": name, "phrase": question.phrase, "box": list(question.box)})
    (home / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
