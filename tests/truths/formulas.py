"""Which formula of pruners.py is which pruner's, of a picture that is made up or seen.

A picture has what formulas take, in float64 and by token: `attention`, `column_attention`,
`similarity` and `one_head_attention` [N], `mean_keys` [N, d], `merge_keys` [T, C] with a row for
CLS, `patches` [N, C], `tokens` [N, D], `text` [W], `text_patches` [N, W], `text_sign`, and the
`geometry` that the tokens lie in: `tokens`, `grids`, `missing`.
"""

import pytest

from truths import pruners as truth

FORMULAS = {
    "cdpruner": lambda s, kept, _: truth.cdpruner(
        s.text, s.text_patches, s.tokens, kept, s.text_sign
    ),
    "cls_attention": lambda s, kept, _: truth.Truth(
        order=truth.top(s.attention, kept), scores=s.attention
    ),
    "cls_similarity": lambda s, kept, _: truth.Truth(
        order=truth.top(s.similarity, kept), scores=s.similarity
    ),
    "column_attention": lambda s, kept, _: truth.Truth(
        order=truth.top(s.column_attention, kept), scores=s.column_attention
    ),
    "dart": lambda s, kept, _: truth.dart(s.tokens, kept),
    "divprune": lambda s, kept, _: truth.divprune(s.tokens, kept),
    "nuwa": lambda s, kept, _: truth.nuwa(
        s.attention, s.patches, kept, s.geometry.grids, s.geometry.missing
    ),
    "prumerge": lambda s, kept, _: merge(s, kept, s.one_head_attention),
    "prumerge_plus": lambda s, kept, _: merge(s, kept, grid_scores(s, kept)),
    "random": lambda s, kept, config: truth.random(s.geometry.tokens, kept, config.seed),
    "spatial": lambda s, kept, _: truth.spatial(s.geometry.grids, kept),
    "text_similarity": lambda s, kept, _: truth.text_similarity(
        s.text, s.text_patches, kept, s.text_sign
    ),
    "trim": lambda s, kept, _: truth.trim(s.text, s.text_patches, s.patches, kept, s.text_sign),
    "visionzip": lambda s, kept, _: truth.visionzip(s.attention, s.mean_keys, s.patches, kept),
    "vispruner": lambda s, kept, _: truth.vispruner(s.attention, s.patches, kept),
}
"""A picture, how many tokens stay, and the settings (their seed) to the choice."""
GREEDY = {"cdpruner", "dart", "divprune", "nuwa", "random", "spatial", "visionzip", "vispruner"}
"""Those without scores by which a near tie could be judged; a new one has scores or is listed."""

COUNTS = {
    "prumerge": lambda s: truth.adaptive_count_iqr(s.one_head_attention),
    "prumerge_plus": lambda s: truth.prumerge_plus_adaptive_count(s.one_head_attention),
    "trim": lambda s: truth.adaptive_count_iqr(
        truth.softmax(truth.text_similarity(s.text, s.text_patches, 1, s.text_sign).scores)
    ),
}
"""Of those whose published method chooses the count: a picture to how many tokens stay."""


def find_formula(pruner):
    """The formula of a pruner; a new pruner needs one."""
    if pruner not in FORMULAS:
        pytest.fail(
            f"no formula of pruner '{pruner}': write it into tests/truths/pruners.py as a plain "
            "loop in float64, and name it in FORMULAS of tests/truths/formulas.py"
        )
    return FORMULAS[pruner]


def find_count(pruner):
    """How many tokens the published rule of an adaptive pruner keeps; a new one needs one."""
    if pruner not in COUNTS:
        pytest.fail(
            f"no formula of the count of pruner '{pruner}': name it in COUNTS of "
            "tests/truths/formulas.py"
        )
    return COUNTS[pruner]


def grid_scores(picture, kept):
    """Of PruMerge+: its grid stands before all others."""
    values = picture.one_head_attention.copy()
    values[truth.prumerge_plus_grid(len(values), kept)] += 2.0
    return values


def merge(picture, kept, scores):
    """Of PruMerge, by scores of its own."""
    attention, order = picture.one_head_attention, truth.top(scores, kept)
    return truth._merge(order, attention, scores, picture.merge_keys, picture.patches)
