"""The tables of docs/results.md, of a sweep's report.json.

    python refshapes/results.py [build/results] [--write docs/results.md]

What stands between the two marks of the page is replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

MODES: Final = ("gap", "compact", "permuted")
BEGIN: Final = "<!-- tables: made by refshapes/results.py -->"
END: Final = "<!-- end of tables -->"

Cells = dict[tuple[str, str, float], dict[str, Any]]


def find_cells(data: dict[str, Any], side: str) -> Cells:
    """The cells of one side under the first protocol, by pruner, mode and ratio."""
    return {
        (cell["pruner"], cell["positions"], cell["ratio"]): cell
        for cell in data["cells"]
        if cell["side"] == side and cell["protocol"] == data["protocols"][0]
    }


def make_accuracy(cells: Cells) -> list[str]:
    """A row for each pruner: GAP / compact / permuted by ratio."""
    pruners = list(dict.fromkeys(pruner for pruner, _, ratio in cells if ratio))
    ratios = sorted({ratio for _, _, ratio in cells if ratio})
    lines = ["| pruner | " + " | ".join(f"{ratio:g} removed" for ratio in ratios) + " |"]
    lines.append("|---|" + "---|" * len(ratios))
    for pruner in pruners:
        row = [
            " / ".join(f"{100 * cells[pruner, mode, ratio]['accuracy']:.1f}" for mode in MODES)
            for ratio in ratios
        ]
        lines.append(f"| `{pruner}` | " + " | ".join(row) + " |")
    return lines


def make_parity(data: dict[str, Any]) -> list[str]:
    """A row for each pruner: answers compared and differing, by mode."""
    counts: dict[str, dict[str, list[int]]] = {}
    for pair in data["comparisons"]:
        if pair["kind"] == "parity" and pair["protocol"] == data["protocols"][0]:
            row = counts.setdefault(pair["pruner"], {}).setdefault(pair["positions"], [0, 0])
            row[0] += pair["phrases"]
            row[1] += pair["differing"]
    if not counts:
        return ["PyTorch was not asked in this run."]
    lines = ["| pruner | " + " | ".join(MODES) + " |", "|---|" + "---|" * len(MODES)]
    for pruner, by_mode in counts.items():
        row = [f"{by_mode[m][1]:,} of {by_mode[m][0]:,}" if m in by_mode else "" for m in MODES]
        lines.append(f"| `{pruner}` | " + " | ".join(row) + " |")
    asked, differing = (
        sum(pair[k] for by_mode in counts.values() for pair in by_mode.values()) for k in (0, 1)
    )
    return [*lines, "", f"Together: {differing:,} of {asked:,} answers differ."]


def make_costs(cells: Cells) -> list[str]:
    """Tokens and cache by ratio; of a pruner that makes no token of what it removes."""
    lines = ["| removed | visual tokens | longest prompt | KV cache, kB |", "|---|---|---|---|"]
    found = {
        ratio: cell for (_, _, ratio), cell in reversed(list(cells.items())) if not cell["extra"]
    }
    for ratio, cell in sorted(found.items()):
        lines.append(
            f"| {ratio:g} | {cell['kept']} of {cell['patches']} | {cell['prompt_tokens']} | "
            f"{cell['cache_bytes'] / 1000:.1f} |"
        )
    return lines


def make_tables(data: dict[str, Any]) -> str:
    """All tables as Markdown."""
    exported, eager = find_cells(data, "exported"), find_cells(data, "pytorch")
    phrases = data["sweep"]["data"]["phrases"]
    unpruned = exported["unpruned", "gap", 0.0]
    share, low, high = (100 * unpruned[name] for name in ("accuracy", "low", "high"))
    head = (
        f"{phrases} phrases of `{data['sweep']['data']['name']}`. Acc@0.5 in % of the exported "
        f"graphs on `{data['sweep']['backend']}`, **GAP / compact / permuted**; unpruned "
        f"{share:.1f} ({low:.1f} to {high:.1f}):"
    )
    text = [
        head,
        "",
        *make_accuracy(exported),
        "",
        "The same in PyTorch"
        + (f"; unpruned {100 * eager['unpruned', 'gap', 0.0]['accuracy']:.1f}:" if eager else ":"),
        "",
        *(make_accuracy(eager) if eager else ["PyTorch was not asked in this run."]),
        "",
        "Answers of PyTorch (float32) and of the exported graphs that are not the same text:",
        "",
        *make_parity(data),
        "",
        "What a phrase costs the decoder:",
        "",
        *make_costs(exported),
    ]
    return "\n".join(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="tables of a sweep as Markdown")
    parser.add_argument("sweep", type=Path, nargs="?", default=Path("build/results"))
    parser.add_argument("--write", type=Path, metavar="PAGE.md")
    options = parser.parse_args()
    data = json.loads((options.sweep / "report.json").read_text(encoding="utf-8"))
    text = make_tables(data)
    if options.write is None:
        print(text)
        return
    page = options.write.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
