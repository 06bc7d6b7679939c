"""Pictures in towers that were made up, for pruners alone."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from truths import pruners as truth

from gap_export.blocks import scores
from gap_export.config.records import PruneConfig
from gap_export.interfaces.features import EagerVision, Feature, Geometry, VisionFeatures

HEADS, WIDTH = 3, 12


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture in a tower that was made up: what a library would give, and what follows.

    V views of T tokens each, CLS first; `order` arranges the patches of all views.
    """

    geometry: Geometry
    states: tuple[torch.Tensor, ...]
    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]
    layer: int
    order: tuple[int, ...]
    tokens: torch.Tensor
    text: torch.Tensor
    text_patches: torch.Tensor
    text_sign: int

    @property
    def merge_block(self):
        return min(self.layer, len(self.keys) - 1)

    def arrange(self, values):
        return values.flatten(0, 1)[list(self.order)]

    @property
    def patches(self):
        return self.arrange(self.states[self.layer][:, 1:]).reshape(self.geometry.tokens, -1)

    def features(self):
        """As the graph's tower makes them."""
        block, merge = self.layer - 1, self.merge_block
        values = {
            Feature.CLS_ATTENTION: scores.cls_attention(
                self.queries[block][:, 0], self.keys[block], HEADS
            ),
            Feature.ATTENTION: scores.cls_attention(
                self.queries[block][:, 0], self.keys[block], HEADS
            ),
            Feature.COLUMN_ATTENTION: scores.column_attention(
                self.queries[block], self.keys[block], HEADS
            ),
            Feature.CLS_SIMILARITY: scores.cls_similarity(self.states[self.layer]),
            Feature.KEYS: scores.mean_keys(self.keys[block], HEADS),
            Feature.MERGE_ATTENTION: scores.merge_attention(
                self.queries[merge][:, 0], self.keys[merge]
            ),
            Feature.MERGE_KEYS: self.keys[merge][:, 1:],
        }
        values = {feature: self.arrange(value)[None] for feature, value in values.items()}
        values |= {
            Feature.TOKENS: self.tokens[None],
            Feature.TEXT: self.text[None],
            Feature.TEXT_PATCHES: self.text_patches[None],
        }
        assert set(values) == set(Feature)
        return VisionFeatures(
            patches_BNC=self.patches[None],
            geometry=self.geometry,
            values=values,
            text_sign=self.text_sign,
        )

    def vision(self):
        """As the library gives them."""
        return EagerVision(
            patches=self.patches,
            tokens=self.tokens,
            hidden_states=self.states,
            attentions=self.attentions,
            queries=self.queries,
            keys=self.keys,
            leading=1,
            layer=self.layer,
            geometry=self.geometry,
            arrange=self.arrange,
            text=self.text,
            text_patches=self.text_patches,
            text_sign=self.text_sign,
        )

    # What the formulas take, in float64.

    def by_token(self, by_view):
        """Lists by view and patch, arranged and pooled."""
        rows = [row for view in by_view for row in np.asarray(view)]
        return truth.pool([rows[index] for index in self.order], self.geometry.strip)

    @functools.cached_property
    def attention(self):
        block = self.layer - 1
        return self.by_token(
            [
                truth.cls_attention_from_qk(q.numpy(), k.numpy(), HEADS, 0).scores
                for q, k in zip(self.queries[block], self.keys[block], strict=True)
            ]
        )

    @functools.cached_property
    def column_attention(self):
        block = self.layer - 1
        return self.by_token(
            [
                truth.column_attention_from_qk(q.numpy(), k.numpy(), HEADS)
                for q, k in zip(self.queries[block], self.keys[block], strict=True)
            ]
        )

    @functools.cached_property
    def similarity(self):
        return self.by_token(
            [
                truth.cls_similarity(view[0].numpy(), view[1:].numpy(), 0).scores
                for view in self.states[self.layer]
            ]
        )

    @functools.cached_property
    def one_head_attention(self):
        block = self.merge_block
        return self.by_token(
            [
                truth._one_head_attention(q[0].numpy(), k.numpy())
                for q, k in zip(self.queries[block], self.keys[block], strict=True)
            ]
        )

    @functools.cached_property
    def merge_keys(self):
        """With a row for CLS, which the formulas drop."""
        keys = self.by_token([view[1:].double().numpy() for view in self.keys[self.merge_block]])
        return np.concatenate([np.ones((1, WIDTH)), keys])

    @functools.cached_property
    def mean_keys(self):
        views = self.keys[self.layer - 1][:, 1:].double().numpy()
        parts = [views[..., head * WIDTH // HEADS :][..., : WIDTH // HEADS] for head in range(3)]
        return self.by_token(sum(parts) / HEADS)


@functools.cache
def make_scene(
    *grids, strip=1, views=1, layer=2, blocks=3, sign=-1, spread=1.0, width=None, seed=0
):
    """A scene of these grids; `spread` stretches queries, `width` is that of the tokens."""
    geometry = Geometry(grids=grids, strip=strip)
    noise = torch.Generator().manual_seed(1000 * geometry.tokens + 10 * strip + seed)

    def draw(*shape):
        return torch.randn(*shape, generator=noise)

    patches, rest = divmod(geometry.tokens * strip, views)
    assert not rest
    states = tuple(draw(views, patches + 1, WIDTH) for _ in range(blocks + 1))
    queries = tuple(spread * states[k] @ draw(WIDTH, WIDTH) / 4 for k in range(blocks))
    keys = tuple(states[k] @ draw(WIDTH, WIDTH) / 4 + draw(WIDTH) for k in range(blocks))

    def attend(query, key):
        q, k = (each.reshape(views, -1, HEADS, WIDTH // HEADS).mT for each in (query, key))
        q, k = q.permute(0, 3, 1, 2), k.permute(0, 3, 2, 1)
        return torch.softmax(q @ k / (WIDTH // HEADS) ** 0.5, dim=-1)

    order = torch.randperm(views * patches, generator=noise).tolist()
    return Scene(
        geometry=geometry,
        states=states,
        queries=queries,
        keys=keys,
        attentions=tuple(attend(q, k) for q, k in zip(queries, keys, strict=True)),
        layer=layer,
        order=tuple(range(patches)) if views == 1 else tuple(order),
        tokens=draw(geometry.tokens, width or 2 * geometry.tokens + 8),
        text=draw(7),
        text_patches=draw(geometry.tokens, 7),
        text_sign=sign,
    )


CONFIG = PruneConfig(seed=3)
SCENES = {
    "one": make_scene((1, 1)),
    "two": make_scene((1, 2)),
    "odd": make_scene((5, 7)),
    "as many neighbours as tokens": make_scene((3, 11)),
    "square": make_scene((8, 8), sign=1),
    "strips": make_scene((6, 4), strip=4),
    "odd strips": make_scene((7, 5), strip=4, layer=3),
    "last block": make_scene((6, 8), layer=3, spread=3.0),
    "views": make_scene((4, 6), (6, 4), (2, 5), views=2),
    "views of strips": make_scene((4, 3), (6, 4), strip=4, views=3),
}
