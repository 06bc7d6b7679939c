"""The tables of docs/results.md, of a sweep's report.json.

    python refshapes/results.py [build/results] [--write docs/results.md]
    python refshapes/results.py build/keeps --counts [--write docs/results.md]

What stands between the two marks of the page is replaced; `--counts` has marks of its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gap_runtime.cli.options import ArgumentParser, run_command
from tables import open_report, write_between

MODES: Final = ("gap", "compact", "permuted")
BEGIN: Final = "<!-- tables: made by refshapes/results.py -->"
END: Final = "<!-- end of tables -->"
BEGIN_COUNTS: Final = "<!-- counts: made by refshapes/results.py --counts -->"
END_COUNTS: Final = "<!-- end of counts -->"

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


def make_counts(data: dict[str, Any]) -> str:
    """A row for each pruner by kept tokens: GAP with its interval, and compact."""
    exported = find_cells(data, "exported")
    unpruned = exported["unpruned", "gap", 0.0]
    rows = [
        cell
        for (pruner, _, ratio), cell in exported.items()
        if ratio and not re.search(r" \(seed \d+\)$", pruner)
    ]
    rows += data["draws"]
    counts = sorted({row["kept"] for row in rows}, reverse=True)
    by_key = {(row["pruner"], row["positions"], row["kept"]): row for row in rows}
    seeds = {row["pruner"]: f", {len(row['seeds'])} seeds" for row in data["draws"]}
    share, low, high = (100 * unpruned[name] for name in ("accuracy", "low", "high"))
    sweep = data["sweep"]
    head = (
        f"{sweep['data']['phrases']} phrases of `{sweep['data']['name']}`. Acc@0.5 in % of the "
        f"exported graphs on `{sweep['backend']}` with the 95 % interval, **GAP** / compact, by "
        f"visual tokens kept of {unpruned['patches']}; unpruned {share:.1f} ({low:.1f} to "
        f"{high:.1f}):"
    )
    lines = [
        head,
        "",
        "| pruner | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---|" * len(counts),
    ]

    def rank(pruner: str) -> float:
        return -sum(by_key[pruner, "gap", kept]["accuracy"] for kept in counts)

    for pruner in sorted({row["pruner"] for row in rows}, key=rank):
        cells = []
        for kept in counts:
            gap, compact = (by_key[pruner, mode, kept] for mode in ("gap", "compact"))
            cells.append(
                f"**{100 * gap['accuracy']:.1f}** ({100 * gap['low']:.0f} to "
                f"{100 * gap['high']:.0f}) / {100 * compact['accuracy']:.1f}"
            )
        lines.append(f"| `{pruner}`{seeds.get(pruner, '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Command line."""
    parser = ArgumentParser(description="tables of a sweep as Markdown")
    parser.add_argument("sweep", type=Path, nargs="?", default=Path("build/results"))
    parser.add_argument("--counts", action="store_true", help="of a sweep over kept counts")
    parser.add_argument("--write", type=Path, metavar="PAGE.md")
    options = parser.parse_args(arguments)
    report = options.sweep / "report.json"
    with open_report(report) as data:
        text = make_counts(data) if options.counts else make_tables(data)
    if options.write is None:
        print(text)
    else:
        begin, end = (BEGIN_COUNTS, END_COUNTS) if options.counts else (BEGIN, END)
        write_between(options.write, begin, end, text)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
