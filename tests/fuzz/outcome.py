"""What a case may end in: an answer, or a refusal in one line. Everything else is a failure."""

import contextlib
import io
import signal
import traceback

from gap_runtime.errors import GapError, NoBoxError

SECONDS = 20
"""Of the processor; on a busy machine a case may take longer by the clock."""
PATIENCE = 8
"""Seconds by the clock for each of these: who waits for nothing takes none of the processor. Told
in as many turns, so that one in which the whole process was stopped counts once."""
FAILURES = ("traceback", "waits", "lines", "wrong")


class WrongResultError(AssertionError):
    """An answer that cannot be right."""


class _TooLateError(BaseException):
    """No answer in time; no Exception, so that nothing takes it for its own."""


@contextlib.contextmanager
def _alarm(seconds):
    turns = []

    def ring(number, _):
        turns.append(number)
        if number == signal.SIGPROF or len(turns) == PATIENCE:
            raise _TooLateError

    timers = ((signal.ITIMER_PROF, signal.SIGPROF), (signal.ITIMER_REAL, signal.SIGALRM))
    before = [signal.signal(number, ring) for _, number in timers]
    for timer, _ in timers:
        signal.setitimer(timer, seconds, seconds)
    try:
        yield
    finally:
        for (timer, number), old in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, old)


def judge(case, seconds=SECONDS):
    """How a case ended (`done`, `refused` or one of FAILURES), and what was said."""
    try:
        with _alarm(seconds):
            case()
    except GapError as error:
        return judge_line(str(error))
    except _TooLateError:
        return "waits", f"no end in {seconds} s of the processor, or {seconds * PATIENCE} s"
    except WrongResultError as error:
        return "wrong", str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # whatever comes is what is looked for; panics of Rust are no Exception
        return "traceback", traceback.format_exc()
    return "done", ""


def judge_line(message):
    """Whether a refusal is one line of printable text."""
    if not message or not message.isprintable() or len(message) > 2000:
        return "lines", repr(message)[:3000]
    return "refused", message


def run_line(main, arguments):
    """A command line in this process; a refusal is raised again as what was printed of it."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    # An answer without a box is an answer.
    if code in {None, 0, NoBoxError.exit_code}:
        return code, out.getvalue(), err.getvalue()
    lines = err.getvalue().splitlines(keepends=False)
    errors = [k for k, line in enumerate(lines) if line.startswith("error: ")]
    if len(errors) != 1 or code not in range(2, 7):
        raise WrongResultError(f"exit {code}, but on stderr: {err.getvalue()!r:.2000}")
    raise GapError("\n".join(lines[errors[0] :]).removeprefix("error: "))
