"""Coverage leads the changes: atheris on the byte parsers that are ours, one after another.

    python -m fuzz.guided MINUTES [NAME ...]

What reaches new code is added to build/fuzz/NAME; `--keep` brings the smallest set that reaches
all of it into the corpus of the repository. A failure is written beside it and ends the parser.
"""

import subprocess
import sys
from pathlib import Path

FIRST = "--one"
HOME = Path("../build/fuzz")
LARGEST = 20_000


def main():
    if sys.argv[1] == FIRST:
        return fuzz_one(sys.argv[2], sys.argv[3:])
    keep, (minutes, *names) = (
        "--keep" in sys.argv,
        [each for each in sys.argv[1:] if each[0] != "-"],
    )
    from fuzz.parsers import HERE, PARSERS

    failed = []
    for name in names or PARSERS:
        found = HOME / name
        found.mkdir(parents=True, exist_ok=True)
        seconds = max(int(float(minutes) * 60 / len(names or PARSERS)), 1)
        options = [
            f"-max_total_time={seconds}",
            f"-artifact_prefix={found}-failed-",
            "-verbosity=0",
        ]
        command = [sys.executable, "-W", "ignore", "-m", "fuzz.guided", FIRST, name]
        done = subprocess.run(
            [*command, *options, f"-max_len={LARGEST}", str(found), str(HERE / name)], check=False
        )
        failed += [name] if done.returncode else []
        print(f"{name}: {'FAILED' if done.returncode else 'no failure'} in {seconds} s")
        if keep:
            subprocess.run([*command, "-merge=1", str(HERE / name), str(found)], check=True)
    return bool(failed)


def fuzz_one(name, options):
    import atheris

    with atheris.instrument_imports(include=["gap_runtime", "gap_export"]):
        from fuzz.outcome import judge_line
        from fuzz.parsers import PARSERS
        from gap_runtime.errors import GapError

        parse = PARSERS[name]()

    def test(data):
        try:
            parse(data)
        except GapError as error:
            outcome, said = judge_line(str(error))
            if outcome != "refused":
                raise AssertionError(said) from error

    atheris.Setup([sys.argv[0], *options], test)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
