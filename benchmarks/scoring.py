"""How many answers a second are scored, by each protocol and with reading the file.

    python -m benchmarks.scoring [--answers 20000]

The answers are made up, in the forms that the published scripts expect. Seconds are of
the processor, of one core.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.command import read_number, run_benchmark
from gap_runtime.cli.options import ArgumentParser
from gap_runtime.evaluation.protocol import list_protocols, load_protocol
from gap_runtime.evaluation.results import (
    AnswerWriter,
    DataFacts,
    Header,
    Row,
    Subject,
    read_answers,
)
from gap_runtime.evaluation.score import score_rows
from gap_runtime.pictures.boxes import BoxFormat

_NUMBER: Final = r"(-?\d+(?:\.\d+)?)"
BOX: Final = BoxFormat(
    attempt=r"\[[^\[\]]*\]?",
    pattern=rf"\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]",
    scale=1.0,
    frame="padded-square",
)


def make_rows(count: int, protocol: str) -> list[Row]:
    """Answers with a box each, in the form of a protocol."""
    rng = random.Random(0)  # noqa: S311 - no secret
    rows = []
    for k in range(count):
        x0, y0 = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
        values = (x0, y0, x0 + rng.uniform(0.1, 0.4), y0 + rng.uniform(0.1, 0.4))
        if protocol == "minigpt-v2":
            answer = "{" + "".join(f"<{round(100 * value)}>" for value in values) + "}"
        else:
            separator = "," if protocol == "shikra" else ", "
            answer = f"[{separator.join(f'{value:.3f}' for value in values)}]"
        rows.append(
            Row(
                key=str(k),
                ratio=0.5,
                picture=f"{k // 3}.jpg",
                phrase="the red mug on the left",
                size=(640, 480),
                box=(640 * x0, 480 * y0, 640 * x0 + 200, 480 * y0 + 150),
                answer=answer,
                token_ids=tuple(range(25)),
                milliseconds={"preprocess": 1.0, "vision": 2.0, "total": 9.0},
                found=((1.0, 2.0, 3.0, 4.0),),
            )
        )
    return rows


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="answers scored a second")
    parser.add_argument("--answers", type=read_number, default=20_000)
    count = parser.parse_args().answers
    for name in list_protocols():
        rows = make_rows(count, name)
        began = time.process_time()
        (score,) = score_rows(rows, name, load_protocol(name), BOX)
        rate = count / (time.process_time() - began)
        print(f"{name}: {rate:,.0f} answers a second (Acc@0.5 {score.accuracy:.3f})")
    subject = Subject(
        name="x", sha256="", engine="", strategy="", positions="gap", dtype="float32"
    )
    data = DataFacts(name="x", format="plain", phrases=count, sha256="")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        with AnswerWriter(Header(subject=subject, data=data, box=BOX), path, resume=False) as file:
            for row in make_rows(count, "ours"):
                file.add(row)
        began = time.process_time()
        read_answers(path)
        print(f"reading a file: {count / (time.process_time() - began):,.0f} answers a second")


if __name__ == "__main__":
    run_benchmark(main)
