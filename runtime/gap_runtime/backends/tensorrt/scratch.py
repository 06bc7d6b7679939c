"""Scratch memory that engines share: they run one after another, so that one block serves all.

The vision, text and decoder engines of a grounder each need some while they run, a picture and a
long prompt the most. On a Jetson that is the machine's own memory.
"""

from __future__ import annotations

import threading
import weakref

from gap_runtime.backends._cuda import Device, DeviceMemory


class Scratch:
    """One block of device memory, as large as the largest of its engines needs.

    An engine that needs more than the others makes it anew, elsewhere: `moves` counts how often.
    Who runs an engine holds `lock` from before it is queued until it is done, and tells its
    context again where the block lies if it has moved since.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.lock = threading.RLock()
        self.moves = 0
        self._memory: DeviceMemory | None = None

    def reserve(self, device: Device, size: int) -> None:
        """Make room for an engine that needs `size` bytes.

        Raises:
            EngineError: There is no room; what was there before still is.
        """
        with self.lock:
            if self._memory is not None and size <= self._memory.size:
                return
            self._memory = device.allocate(size)
            # It is zeroed on this device's stream, and may be used on another's.
            device.synchronize()
            self.moves += 1

    @property
    def place(self) -> tuple[int, int]:
        """Address and size of the block."""
        assert self._memory is not None
        return self._memory.address, self._memory.size


_OF_THREAD = threading.local()


def share_scratch() -> Scratch:
    """The scratch memory of engines that this thread opens; it goes with the last of them.

    Threads that ground side by side open their engines themselves, and do not wait for each other.
    """
    held: Scratch | None = getattr(_OF_THREAD, "scratch", lambda: None)()
    if held is None:
        held = Scratch()
        _OF_THREAD.scratch = weakref.ref(held)
    return held
