"""One worker: order, a full queue, work that takes too long, clients that leave."""

import asyncio
import gc
import threading
import time
import weakref

import pytest

from gap_runtime.service.worker import BusyError, GoneError, LateError, Worker


def drive(make):
    """Run a coroutine on a worker that is stopped behind it."""

    async def run():
        worker = Worker(2)
        try:
            return await make(worker)
        finally:
            assert worker.stop(5)

    return asyncio.run(run())


def test_work_is_done_in_order_in_one_other_thread():
    seen = []

    async def ask(worker):
        def work(k):
            return lambda _: seen.append((k, threading.get_ident()))

        await asyncio.gather(worker.run(work(0)), worker.run(work(1)))
        await asyncio.sleep(0.01)
        return worker.waiting

    assert drive(ask) == 0
    assert [k for k, _ in seen] == [0, 1]
    assert len({thread for _, thread in seen}) == 1
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_errors_of_the_work_come_back():
    def fail(_):
        raise KeyError("x")

    async def ask(worker):
        with pytest.raises(KeyError):
            await worker.run(fail)
        return await worker.run(lambda _: "still there")

    assert drive(ask) == "still there"


def test_a_full_queue_is_told_at_once():
    async def ask(worker):
        held = threading.Event()
        waiting = [asyncio.ensure_future(worker.run(lambda _: held.wait(5))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError) as raised:
            await worker.run(lambda _: None)
        held.set()
        await asyncio.gather(*waiting)
        await asyncio.sleep(0.01)
        return raised.value.retry_after, await worker.run(lambda _: 7)

    retry_after, again = drive(ask)
    assert (retry_after >= 1, again) == (True, 7)


def test_late_work_is_given_up_and_what_waits_is_not_begun():
    begun = []

    async def ask(worker):
        slow = asyncio.ensure_future(worker.run(lambda event: event.wait(5), seconds=0.05))
        await asyncio.sleep(0)
        with pytest.raises(LateError):
            await worker.run(begun.append, seconds=0.01)
        with pytest.raises(LateError):
            await slow
        began = time.monotonic()
        # What was given up has ended by itself.
        assert await worker.run(lambda _: 7) == 7
        return time.monotonic() - began

    assert drive(ask) < 2
    assert begun == []


def test_work_that_is_given_up_before_its_turn_is_let_go_of():
    class Picture:
        pass

    async def ask(worker):
        picture = Picture()
        alive = weakref.ref(picture)
        slow = asyncio.ensure_future(worker.run(lambda event: event.wait(5), seconds=0.5))
        await asyncio.sleep(0)
        with pytest.raises(LateError):
            await worker.run(lambda _, picture=picture: picture, seconds=0.01)
        del picture
        gc.collect()
        gone = alive() is None
        with pytest.raises(LateError):
            await slow
        return gone

    assert drive(ask)


def test_a_client_that_leaves_frees_the_worker():
    async def ask(worker):
        async def leave():
            await asyncio.sleep(0.02)

        with pytest.raises(GoneError):
            await worker.run(lambda event: event.wait(5), gone=leave)
        return await worker.run(lambda _: 7)

    assert drive(ask) == 7


def test_what_still_runs_is_not_waited_for_longer_than_allowed():
    async def ask():
        worker = Worker(2)
        held = threading.Event()
        asked = asyncio.ensure_future(worker.run(lambda _: held.wait(5)))
        await asyncio.sleep(0.01)
        assert not worker.stop(0.05)
        held.set()
        await asked

    asyncio.run(ask())
