"""The pickles of the refer toolkit, `refs(unc).p`, with COCO's `instances.json` beside them.

    refs      list of {ref_id, ann_id, image_id, file_name, split, sentences: [{sent, sent_id}]}
    instances {images: [{id, width, height, file_name}], annotations: [{id, bbox}]}, xywh in pixels

The pictures are those of COCO train2014. A pickle is a program: this one may only build plain
values, and anything else that it asks for is refused by name.

References:
    lichengunc/refer, refer.py.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from gap_runtime.errors import InputError
from gap_runtime.evaluation.expression import Expression, find_picture
from gap_runtime.evaluation.fields import (
    describe,
    read_extent,
    read_list,
    read_name,
    read_path,
    read_size,
    read_text,
)
from gap_runtime.evaluation.files import read_bytes, read_json
from gap_runtime.evaluation.source import Source, existing
from gap_runtime.evaluation.splits import USUAL_BY

SUFFIXES: Final = (".p", ".pkl", ".pickle")
USUAL: Final = None
_INSTANCES: Final = "instances.json"
_SETS: Final = {"set": set, "frozenset": frozenset}


def recognise(head: Any) -> bool:
    """Whether it is of this format: by its ending alone."""
    return head is None


def locate(folder: Path, source: Source) -> tuple[Path, ...]:
    """`SET/refs(BY).p` or `refs(BY).p`."""
    file = f"refs({source.by or USUAL_BY.get(source.name, 'unc')}).p"
    return existing(folder / source.name / file, folder / file)


def read(source: Source) -> Iterator[Expression]:
    """All phrases of the split, object by object."""
    path = source.path
    refs = load_plain_pickle(path)
    if not isinstance(refs, list):
        raise InputError(f"{path}: holds {describe(refs)}, expected a list of refs")
    splits = sorted({read_name(ref, "split", f"{path}: ref {k}") for k, ref in enumerate(refs)})
    if source.split not in splits:
        raise InputError(
            f"{path}: no split '{source.split}' in it; have {', '.join(splits)}; "
            "say --data SET:SPLIT@PATH, for example refcoco:val@DIR"
        )
    boxes, pictures = _read_instances(path.parent / _INSTANCES)
    images = source.images or path.parent
    for k, ref in enumerate(refs):
        where = f"{path}: ref {k}"
        if ref["split"] != source.split:
            continue
        annotation = boxes.get(read_name(ref, "ann_id", where))
        image = pictures.get(read_name(ref, "image_id", where))
        if annotation is None or image is None:
            raise InputError(f"{where}: its object or picture is not in {_INSTANCES}")
        # Not the ref's own file_name, which ends in a number for the object.
        file = read_path(image, "file_name", where)
        picture = find_picture(file, images, where, turned=False, flat=True)
        for sentence in read_list(ref, "sentences", where):
            yield Expression(
                key=read_name(sentence, "sent_id", where),
                picture=picture,
                phrase=read_text(sentence, "sent", where),
                box=read_extent(annotation, "bbox", where),
                size=read_size(image, where),
                target=read_name(ref, "ref_id", where),
            )


def _read_instances(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Annotations and pictures by their id."""
    data = read_json(path)
    boxes, pictures = (
        {read_name(each, "id", f"{path}: {key}"): each for each in read_list(data, key, str(path))}
        for key in ("annotations", "images")
    )
    return boxes, pictures


def load_plain_pickle(path: Path) -> Any:
    """The value of a pickle of lists, tables, text and numbers.

    Raises:
        InputError: It is damaged, or asks for anything else.
    """
    data = read_bytes(path)
    try:
        # Text of Python 2 is bytes in any encoding. From memory, no length can claim too much.
        return _PlainUnpickler(
            io.BytesIO(data), fix_imports=False, encoding="utf-8", errors="replace"
        ).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (
        *(pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, EOFError),
        *(OverflowError, MemoryError, RecursionError, AssertionError, ImportError, struct.error),
    ) as error:
        raise InputError(
            f"{path}: a damaged pickle ({' '.join(str(error).split()):.100})"
        ) from error


# Written in Python: the memo of the one in C takes any index for a size to allocate.
class _PlainUnpickler(pickle._Unpickler):  # noqa: SLF001
    """An unpickler that builds plain values."""

    def find_class(self, module: str, name: str) -> Any:
        """Sets, and an error for anything else."""
        if module in {"builtins", "__builtin__"} and name in _SETS:
            return _SETS[name]
        raise InputError(
            f"the pickle asks for '{module:.40}.{name:.40}', which is no plain value; "
            "it may hold code and is not read"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        """Always an error."""
        raise InputError(f"the pickle asks for an object outside it ({describe(pid)})")

    def get_extension(self, code: int) -> NoReturn:
        """Always an error: a code may stand for any class."""
        raise InputError(f"the pickle asks for extension {code}, which is no plain value")
