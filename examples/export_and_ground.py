"""Export a model, check it, and ask where something is. Needs gap-export.

python examples/export_and_ground.py
"""

import argparse
from pathlib import Path

import gap_export
from gap_runtime import Grounder, draw

SAMPLES = Path(__file__).resolve().parent.parent / "refshapes" / "samples"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="refshapes", help="a name, or a checkpoint's folder")
    parser.add_argument("--picture", type=Path, default=SAMPLES / "test-006.png")
    parser.add_argument("--phrase", default="the top yellow circle")
    parser.add_argument("--out", type=Path, default=Path("build/example"))
    options = parser.parse_args()

    # Half of the visual tokens are removed; 0 keeps all, to compare with.
    result = gap_export.export(options.model, ratios=[0, 0.5], out=options.out)
    print(result.describe_check())

    with Grounder(result.bundle) as grounder:
        for ratio in (0, 0.5):
            found = grounder.ground(options.picture, options.phrase, ratio=ratio)
            print(f"{ratio:.0%} removed: {found}")
        painted = draw(grounder.bundle, options.picture, found)
    painted.save(options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
