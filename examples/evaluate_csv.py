"""Measure a bundle on pictures and boxes of your own, from a CSV file.

    python examples/evaluate_csv.py BUNDLE MINE.csv

The file has a header, image,phrase,x0,y0,x1,y1, and a row for each phrase. Boxes are in pixels,
pictures lie beside the file. docs/evaluation.md says more.
"""

import argparse

from gap_runtime import evaluate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("data")
    options = parser.parse_args()

    found = evaluate(options.bundle, options.data)
    for score in found.scores:
        print(
            f"{score.ratio:.0%} removed: {score.accuracy:.1%} of {score.phrases} phrases right "
            f"({score.low:.1%} to {score.high:.1%})"
        )


if __name__ == "__main__":
    main()
