"""The pickle of a torch file, read without running code or asking for memory."""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch._subclasses.fake_tensor import FakeTensorMode

from gap_export.errors import CheckpointError

DAMAGE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a broken file raises where it is taken apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Bytes of a file that hold one storage."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """What a file's pickle holds, with tensors that have no memory.

    `records` are by what the storages of those tensors have as `_checkpoint_offset`.
    """

    loaded: Any
    records: dict[int, Record]


_PLAIN: Final = re.compile(rb"_rebuild_tensor_v2|_rebuild_parameter|OrderedDict|\w+Storage")
"""What a state dict is made of; none of it asks for memory of its own."""


def is_plain(pickled: bytes) -> bool:
    """Whether all that a pickle calls are the parts of a state dict.

    Bytes that only look like a call make it not plain, never the other way round.
    """
    called = re.findall(rb"c([\w.]+)\n(\w+)\n", pickled)
    # A storage without a dtype in its name is one that a pickle may make, of any size.
    return not re.search(rb"(?:Unt|T)ypedStorage", pickled) and all(
        _PLAIN.fullmatch(name) or (module == b"torch" and name.islower())
        for module, name in called
    )


@contextlib.contextmanager
def unpickling(shown: Path, *, plain: bool = False) -> Iterator[None]:
    """Tensors get no memory meanwhile, and what a pickle may raise becomes one line.

    Args:
        shown: How errors name the file.
        plain: All tensors are loaded onto "meta", and nothing else is made.

    Raises:
        CheckpointError: The pickle asks for code to be run, or is damaged.
    """
    try:
        # Fake mode also keeps a pickle from asking for memory, at a millisecond a tensor.
        with warnings.catch_warnings(), contextlib.nullcontext() if plain else FakeTensorMode():
            warnings.simplefilter("ignore")
            yield
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = "more than tensors and plain values"
        if refused:
            found = f"code ({refused[1]:.100}), which was not run"
        raise CheckpointError(
            f"{shown}: its pickle holds {found}; where you trust the file, load it with torch and "
            "save its state dict alone with torch.save"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in every way
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{shown}: its pickle cannot be read ({type(error).__name__}: {reason:.100}); "
            "download it again, or save its state dict again with torch.save"
        ) from error
