"""Change input at every border for some minutes and count what comes of it.

    python -m fuzz --bundle BUNDLE --minutes 10 [--kinds manifest files] [--seed 7]

A case is named KIND:SEED:NUMBER and made again by `--only KIND:SEED:NUMBER`.
"""

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from fuzz import bundles, checkpoints, compiled, families, hub, inputs, parsers, requests, videos
from fuzz.bundles import BundleCase
from fuzz.outcome import FAILURES, judge

KINDS = {
    "manifest": bundles.manifests,
    "files": bundles.files,
    "arrays": bundles.arrays,
    "tokenizers": bundles.tokenizers,
    "pictures": inputs.pictures,
    "phrases": inputs.phrases,
    "boxes": inputs.boxes,
    "data": inputs.data_files,
    "answers": inputs.answers,
    "arguments": inputs.arguments,
    "ground-bodies": requests.ground_bodies,
    "chat-bodies": requests.chat_bodies,
    "forms": requests.forms,
    "pipe": requests.pipe,
    "videos": videos.videos,
    "hub": hub.replies,
    "compiled": compiled.openvino,
    "settings": checkpoints.settings,
    "weights": checkpoints.weight_files,
    "families": families.families,
    "adapters": families.adapters,
    "torch": checkpoints.torch_files,
    "configurations": checkpoints.configurations,
    **{f"parse-{name}": parsers.parsed(name) for name in parsers.PARSERS},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", metavar="KIND:SEED:NUMBER")
    parser.add_argument("--log", type=Path, help="append every failure to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gap-fuzz-") as home:
        # For cases that run without root's rights.
        Path(home).chmod(0o755)
        case = BundleCase(options.bundle.resolve(), Path(home))
        if options.only:
            return run_one(case, options.only)
        return run_all(case, options)


def run_one(case, name):
    kind, seed, number = name.rsplit(":", 2)
    what, run = KINDS[kind](case)(random.Random(f"{kind}:{seed}:{number}"))
    outcome, said = judge(run)
    print(f"{name}: {what}\n{outcome}: {said}")
    return outcome in FAILURES


def run_all(case, options):
    counts = {kind: collections.Counter() for kind in options.kinds}
    makers = {}
    for kind in options.kinds:
        try:
            makers[kind] = KINDS[kind](case)
            # Libraries are imported by the first case, which is not timed.
            judge(makers[kind](random.Random(kind))[1], seconds=600)
        except Exception as error:
            print(f"{kind}: cannot begin: {error!r}", file=sys.stderr)
    end, number = time.monotonic() + options.minutes * 60, 0
    while time.monotonic() < end:
        number += 1
        for kind, make in makers.items():
            # Every kind has the same time, not the same number of cases.
            until, k = time.monotonic() + 3, 0
            while time.monotonic() < until:
                k += 1
                name = f"{kind}:{options.seed}:{number}-{k}"
                what, run = make(random.Random(name))
                outcome, said = judge(run)
                counts[kind][outcome] += 1
                if outcome in FAILURES:
                    report(options.log, f"{name}: {what}\n{outcome}: {said}\n")
    show(counts)
    return any(counts[kind][outcome] for kind in counts for outcome in FAILURES)


def report(log, text):
    if log is None:
        print(text, file=sys.stderr)
    else:
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")


def show(counts):
    columns = ("done", "refused", *FAILURES)
    print(f"{'kind':<18}{'cases':>8}" + "".join(f"{name:>11}" for name in columns))
    for kind, found in counts.items():
        print(f"{kind:<18}{found.total():>8}" + "".join(f"{found[c]:>11}" for c in columns))
    total = sum(counts.values(), collections.Counter())
    print(f"{'all':<18}{total.total():>8}" + "".join(f"{total[c]:>11}" for c in columns))


if __name__ == "__main__":
    sys.exit(main())
