"""Every family as a small random checkpoint in the files that it was published in.

One place knows which folders belong together and what `gap-export` has to be told about them, so
that a test can ask for a family by name. Checkpoints are made once for all tests and only read.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.interfaces.features import Feature, settle_needs
from gap_export.pipeline import run as pipeline
from gap_export.pipeline.graph_cache import GraphCache
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request
from gap_runtime.registry import list_plugins, load_plugin
from makers import originals
from makers.checkpoints import make_llava_checkpoint
from makers.originals.files import SPREAD

_WITHOUT_CLS_GIVEN = frozenset(
    {
        Feature.COLUMN_ATTENTION,
        Feature.KEYS,
        Feature.TOKENS,
        Feature.TEXT,
        Feature.TEXT_PATCHES,
    }
)
PHRASE = "the red ring left of the blue box"
_NEEDS = {
    name: load_plugin("gap_export.pruners", name, "pruner").NEEDS
    for name in list_plugins("gap_export.pruners")
}
READ_PHRASE = frozenset(name for name, needs in _NEEDS.items() if Feature.TEXT in needs)
"""Pruners that look at the phrase."""
ANSWER = 5


def serves(family, pruner):
    """Whether a family gives what a pruner needs."""
    needs = settle_needs(_NEEDS[pruner], _WITHOUT_CLS_GIVEN)
    return family not in WITHOUT_CLS or needs <= _WITHOUT_CLS_GIVEN


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """A family's files, and how they are asked for.

    Everything lies in `home`. `model` and `checkpoint` are the arguments of that name of
    `gap-export`, `overrides` are needed always, `text` only where the pruner reads the phrase.
    `pruner` is the one that is taken where none is named.
    `buckets` are the numbers of visual tokens of each bucket, all and never removed, `sizes`
    (width, height) of a picture for each. `files` is what the maker gave.
    """

    name: str
    home: Path
    model: str
    checkpoint: Path | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    buckets: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    picture: Path
    samples: Path
    files: Any
    pruner: str = "cls_attention"

    def place(self, role=""):
        """The folder or file of a part, of the checkpoint itself without a role."""
        if not role:
            return Path(self.model) if self.checkpoint is None else self.checkpoint
        return Path((self.overrides | self.text)[f"parts.{role}"])

    def copy(self, home):
        """The same in files of its own, which a test may change."""
        shutil.copytree(self.home, home)

        def move(value):
            return value.replace(str(self.home), str(home)) if isinstance(value, str) else value

        return replace(
            self,
            home=home,
            model=move(self.model),
            checkpoint=self.checkpoint and Path(move(str(self.checkpoint))),
            overrides={key: move(value) for key, value in self.overrides.items()},
            text={key: move(value) for key, value in self.text.items()},
            picture=Path(move(str(self.picture))),
            samples=Path(move(str(self.samples))),
            files=None,
        )

    def plan(
        self,
        out,
        *,
        pruner=None,
        bring="copy",
        reference=False,
        target="cpu",
        **overrides,
    ):
        """The plan of an export with a short answer; overrides have `__` for the dot."""
        pruner = pruner or self.pruner
        values = self.overrides | {
            "dtype": "float32",
            "check.samples": str(self.samples),
            "prompt.answer": ANSWER,
            "prune.strategy": pruner,
        }
        values |= self.text if pruner in READ_PHRASE else {}
        values |= {key.replace("__", "."): value for key, value in overrides.items()}
        return plan_export(
            make_request(
                self.model,
                settings=values,
                checkpoint=self.checkpoint,
                target=target,
                out=out,
                bring=bring,
                reference=reference,
            )
        )


def export(plan):
    """Carry out a plan without showing anything."""
    return pipeline.export(plan)


GRAPHS = GraphCache()
"""Of all tests of this process."""


@contextmanager
def shared_graphs():
    """Exports in which graphs that are the same are traced once.

    All is still joined, written, proved and run anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "GraphCache", lambda **_: GRAPHS)
        yield


def make_picture(width, height, seed=0):
    """Soft colours with sharp edges, RGB."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(rows / (3 + k) + columns / (5 - k) + seed) for k in range(3)]
    values = np.stack(waves, axis=-1) + rng.integers(-20, 20, (height, width, 3))
    values[height // 3 :, : width // 2] += 60
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def make_samples(folder, picture, phrase=PHRASE):
    """A folder of one picture and one phrase, as `check.samples` takes it; the picture's path."""
    folder.mkdir(parents=True)
    picture.save(folder / "picture.png")
    entries = [{"image": "picture.png", "phrase": phrase}]
    (folder / "samples.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "picture.png"


_made: dict[tuple[str, int | None], FamilyCase] = {}


def find_family(name, tmp_path_factory, *, head_dim=None):
    """The family of that name; made when it is asked for first.

    All heads are `head_dim` wide where it is given, otherwise of odd widths.
    """
    key = (name, head_dim)
    if key not in _made:
        home = tmp_path_factory.mktemp("families") / name
        home.mkdir()
        _made[key] = _ENTRIES[name].make(home, head_dim)
    return _made[key]


def _find_case(home, *, sizes, **told):
    """The family that `home` is named after, with a picture of the first size to ask about."""
    samples = home / "samples"
    picture = make_samples(samples, make_picture(*sizes[0]))
    return FamilyCase(
        name=home.name, home=home, sizes=sizes, samples=samples, picture=picture, **told
    )


def _make_llava(home, head_dim):
    """5x5 patches; three query heads to a key head; nothing is a power of two."""
    folder = make_llava_checkpoint(
        home / "llava",
        image_size=70,
        vision_width=3 * (head_dim or 12),
        vision_heads=3,
        vision_layers=4,
        width=66,
        heads=6,
        kv_heads=2,
        head_dim=head_dim or 14,
        mlp=90,
        layers=3,
        names="modern",
        seed=1,
    )
    clip = originals.make_clip(
        home / "clip",
        image_size=70,
        vision_width=3 * (head_dim or 12),
        vision_heads=3,
        projection=22,
        seed=2,
    )
    return _find_case(
        home,
        model=str(folder),
        text={"parts.clip": str(clip)},
        buckets=((25, 0),),
        sizes=((90, 61),),
        files=folder,
    )


def _make_llava_original(home, head_dim):
    """5x5 patches; the vision tower lies in the CLIP folder beside the checkpoint."""
    clip = originals.make_clip(
        home / "openai" / "clip-tiny-patch14-70",
        image_size=70,
        vision_width=5 * (head_dim or 8),
        vision_heads=5,
        vision_layers=4,
        files="bin",
        text_eos="eot",
        seed=3,
    )
    folder = originals.make_llava_original(
        home / "liuhaotian" / "llava-v1.5-tiny",
        clip,
        width=6 * (head_dim or 10),
        heads=6,
        mlp=84,
        layers=3,
        seed=4,
    )
    return _find_case(
        home,
        model=str(folder),
        overrides={"parts.clip": str(clip)},
        buckets=((25, 0),),
        sizes=((61, 90),),
        files=folder,
    )


def _make_next_vicuna(home, head_dim):
    """Tiles of 3x3 patches in two buckets: all 3 rows of a canvas of three tiles, and one row."""
    folder = originals.make_llava_next(
        home / "llava-v1.6-vicuna-tiny",
        image_size=42,
        vision_width=3 * (head_dim or 12),
        vision_heads=3,
        width=6 * (head_dim or 10),
        heads=6,
        max_shard_size="100KB",
        seed=5,
    )
    clip = originals.make_clip(
        home / "clip",
        image_size=42,
        vision_width=3 * (head_dim or 12),
        vision_heads=3,
        text_width=4 * (head_dim or 6),
        text_heads=4,
        seed=6,
    )
    return _find_case(
        home,
        model=str(folder),
        overrides={"image.canvas": "126x42,126x42/9:1"},
        text={"parts.clip": str(clip)},
        buckets=((9 + 3 * 10, 3), (9 + 1 * 10, 1)),
        sizes=((160, 50), (270, 30)),
        files=folder,
    )


def _make_next_mistral(home, head_dim):
    """Tiles of 4x4 patches, 6 of 8 rows of a square canvas; today's names, grouped heads."""
    folder = originals.make_llava_next(
        home / "llava-v1.6-mistral-tiny",
        text="mistral",
        names="modern",
        image_size=56,
        vision_width=5 * (head_dim or 8),
        vision_heads=5,
        width=9 * (head_dim or 8),
        heads=9,
        kv_heads=3,
        layers=3,
        seed=7,
    )
    clip = originals.make_clip(
        home / "clip",
        image_size=56,
        vision_width=5 * (head_dim or 8),
        vision_heads=5,
        projection=18,
        seed=8,
    )
    return _find_case(
        home,
        model=str(folder),
        overrides={"image.canvas": "112x112/4:3"},
        text={"parts.clip": str(clip)},
        buckets=((16 + 6 * 9, 6),),
        sizes=((160, 120),),
        files=folder,
    )


def _make_shikra(home, head_dim):
    """6x6 patches; the weights are differences, stored in float16."""
    files = originals.make_shikra(
        home,
        image_size=84,
        vision_width=48,
        vision_heads=3,
        width=7 * (head_dim or 8),
        heads=7,
        mlp=76,
        seed=9,
    )
    return _find_case(
        home,
        model=str(files.delta),
        overrides={"parts.base": str(files.base), "parts.clip": str(files.clip)},
        buckets=((36, 0),),
        sizes=((90, 50),),
        files=files,
    )


def _make_minigpt(home, head_dim):
    """8x8 patches, four to a token; the whole of EVA's file is run, its table is stretched."""
    files = originals.make_minigpt(
        home / "minigpt",
        image_size=56,
        patch_size=7,
        spare_blocks=0,
        ln_vision=True,
        width=4 * (head_dim or 12),
        kv_heads=2,
        alpha=24,
        layers=3,
        seed=10,
    )
    return _find_case(
        home,
        model="minigpt-v2",
        checkpoint=files.checkpoint,
        overrides={
            "parts.vision": str(files.eva),
            "parts.language": str(files.llama),
            "vision.side": 56,
        },
        buckets=((16, 0),),
        sizes=((80, 60),),
        files=files,
    )


def _make_internvl3(home, head_dim):
    """Tiles of 3x3 tokens of 2x2 patches, in two buckets: three with the whole, and one alone."""
    folder = originals.make_internvl(
        home / "InternVL3-tiny-hf",
        vision_width=3 * (head_dim or 12),
        vision_heads=3,
        vision_layers=4,
        width=6 * (head_dim or 14),
        heads=6,
        kv_heads=2,
        rope_type="dynamic",
        most_tiles=3,
        # What four bits change of an answer is as large as the answer where weights are larger:
        # the library's own model with weights rounded by hand moves by half of its logits.
        spread=SPREAD if head_dim is None else 0.08,
        seed=11,
    )
    return _find_case(
        home,
        model=str(folder),
        overrides={"image.canvas": "72x24,24x24"},
        buckets=((4 * 9, 0), (9, 0)),
        sizes=((150, 50), (60, 61)),
        files=folder,
    )


def _make_internvl3_5(home, head_dim):
    """One tile of 4x4 tokens for every picture; every norm that a config can ask for."""
    folder = originals.make_internvl(
        home / "InternVL3_5-tiny-HF",
        text="qwen3",
        image_size=56,
        patch_size=7,
        vision_width=5 * (head_dim or 8),
        vision_heads=5,
        head_norms=True,
        norm_type="rms_norm",
        attention_bias=False,
        mean_pooling=False,
        mask_token=True,
        width=72,
        heads=6,
        kv_heads=3,
        head_dim=head_dim or 16,
        tied=True,
        max_shard_size="100KB",
        seed=12,
    )
    return _find_case(
        home,
        model=str(folder),
        overrides={"image.tiles": 1},
        buckets=((16, 0),),
        sizes=((61, 90),),
        files=folder,
    )


def _make_onevision(home, head_dim):
    """Tiles of 4x4 patches in 31 pixels, in two buckets, of which the mosaic of one is shrunk."""
    folder = originals.make_llava_onevision(
        home / "llava-onevision-qwen2-tiny-hf",
        vision_width=3 * (head_dim or 12),
        width=6 * (head_dim or 14),
        views=3,
        tied=True,
        seed=13,
    )
    return _find_case(
        home,
        model=str(folder),
        overrides={"image.canvas": "93x62,62x31"},
        buckets=((16 + 5 * 9, 5), (16 + 4 * 9, 4)),
        sizes=((150, 100), (62, 31)),
        files=folder,
        pruner="column_attention",
    )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A family in the tests. `make` makes its files in a folder: (home, head_dim) -> FamilyCase.

    `clip` says that its tower is CLIP's, `cls` that there is a CLS token, without which some
    pruners are not served. `further` are files of an entry above once more, whose graphs differ
    in sizes alone.
    """

    make: Callable[[Path, int | None], FamilyCase]
    clip: bool = False
    cls: bool = True
    further: bool = False


_ENTRIES = {
    "llava": Entry(make=_make_llava, clip=True),
    "llava-original": Entry(make=_make_llava_original, clip=True, further=True),
    "llava-next-vicuna": Entry(make=_make_next_vicuna, clip=True, further=True),
    "llava-next-mistral": Entry(make=_make_next_mistral, clip=True),
    "shikra": Entry(make=_make_shikra, clip=True),
    "minigpt-v2": Entry(make=_make_minigpt),
    "internvl3": Entry(make=_make_internvl3),
    "internvl3.5": Entry(make=_make_internvl3_5, further=True),
    "llava-onevision": Entry(make=_make_onevision, cls=False),
}
"""A new family is one more; the tests of all families take it from here."""
FAMILIES = tuple(name for name, entry in _ENTRIES.items() if entry.cls)
ARCHITECTURES = tuple(name for name in FAMILIES if not _ENTRIES[name].further)
"""Those whose graphs differ in more than sizes."""
CLIP_FAMILIES = tuple(name for name in FAMILIES if _ENTRIES[name].clip)
WITHOUT_CLS = tuple(name for name, entry in _ENTRIES.items() if not entry.cls)
EVERY_FAMILY = (*FAMILIES, *WITHOUT_CLS)
DIAGONAL = tuple(
    (family, sorted(_NEEDS)[k * len(_NEEDS) // len(ARCHITECTURES)])
    for k, family in enumerate(ARCHITECTURES)
)
"""Every architecture with another pruner: what test_matrix.py exports by default, and
test_families_masked.py leaves to it."""
