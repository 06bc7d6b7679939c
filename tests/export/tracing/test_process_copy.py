"""A copy of the process: what it sends, what it holds open, and that none is left."""

import fcntl
import os

import pytest

from gap_export.tracing.process_copy import ProcessCopy


def test_what_it_makes_comes_in_order_and_ends():
    with ProcessCopy(lambda: iter([1, {"two": b"2" * 2**20}, os.getpid()])) as copy:
        first, second, process = copy.receive()
    assert (first, second) == (1, {"two": b"2" * 2**20})
    assert process != os.getpid()


def test_what_it_fails_at_does_not_come():
    def work():
        yield 1
        raise MemoryError

    with ProcessCopy(work) as copy:
        assert list(copy.receive()) == [1]


def test_patience_ends():
    def work():
        yield 1
        while True:
            pass

    with ProcessCopy(work) as copy:
        assert list(copy.receive(0.5)) == [1]
    with pytest.raises(ChildProcessError):
        os.waitpid(copy._process, os.WNOHANG)


def test_a_lock_is_let_go_while_the_copy_lives(tmp_path):
    """The copy keeps what it needs alone, so that the lock is the process's."""
    needed, unneeded = os.pipe()
    with (tmp_path / "lock").open("w") as held, (tmp_path / "lock").open("w") as other:
        fcntl.flock(held, fcntl.LOCK_EX)

        def work():
            yield "begun"
            while True:
                os.fstat(needed)

        with ProcessCopy(work, needs=[needed]) as copy:
            assert next(copy.receive()) == "begun"
            held.close()
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Still at work: it has what it needs.
            assert os.waitpid(copy._process, os.WNOHANG) == (0, 0)
    os.close(needed)
    os.close(unneeded)
