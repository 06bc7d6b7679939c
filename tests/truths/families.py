"""Every family of tests/makers/families.py in float64 and without the exporter.

Visual tokens, what pruners look at, and the decoder with some visual tokens hidden: Hugging
Face's own classes where the library has the model, else tests/truths/published.py. Nothing here
knows position modes or graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from makers import originals
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from truths import pruners as truth
from truths import published
from truths.formulas import find_count, find_formula

NEWLINE = -1
# N visual tokens, R of them removable, P patches of a view, V views, T = P + 1 with the CLS
# token first, C vision width, D decoder width, W text width.


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A picture and a phrase as the towers see them, float64.

    `tokens` [N, D] are all visual tokens, `removable` the indices of those that show something.
    All others are by removable token and named as in formulas.py: `attention` and `similarity`
    [R] of CLS, `column_attention` [R] received from all tokens, `mean_keys` [R, d] over heads,
    `one_head_attention` [R] and `merge_keys` [R, C] of the block after, `patches` [R, C] before
    the projector, and `text_patches` [R, W], which the phrase `text` [W] is compared with.
    """

    tokens: torch.Tensor
    removable: list[int]
    attention: np.ndarray
    column_attention: np.ndarray
    similarity: np.ndarray
    mean_keys: np.ndarray
    one_head_attention: np.ndarray
    merge_keys: np.ndarray
    patches: torch.Tensor
    text: torch.Tensor
    text_patches: torch.Tensor
    text_sign: int

    def prune(self, pruner, kept, grids):
        """What a rule of tests/truths/pruners.py makes of the removable tokens.

        `grids` are the (rows, columns) that they lie in; the seed is 0.
        """
        own = {
            "tokens": self.tokens[self.removable],
            "geometry": SimpleNamespace(tokens=len(self.removable), grids=grids, missing=()),
            # With a row for CLS, which the formulas drop.
            "merge_keys": np.concatenate([self.merge_keys[:1], self.merge_keys]),
        }
        picture = SimpleNamespace(**vars(self) | own)
        return find_formula(pruner)(picture, kept, SimpleNamespace(seed=0))

    def count_adaptively(self, pruner):
        """How many tokens the published rule keeps of this picture."""
        return find_count(pruner)(self)


@dataclass(frozen=True, kw_only=True)
class FamilyTruth:
    """A family's vision side and decoder.

    `project` makes visual tokens of patches; `decoder` are tensors in Hugging Face's names, and
    `run` the library's own decoder where it is not Llama's: rows, position IDs and mask to logits.
    """

    look: Callable[..., Seen]
    project: Callable[[torch.Tensor], torch.Tensor]
    decoder: dict[str, torch.Tensor]
    heads: int
    theta: float = 1e4
    eps: float = 1e-5
    run: Callable[..., torch.Tensor] | None = None

    def embed(self, ids):
        return self.decoder["model.embed_tokens.weight"][list(ids)].double()

    def answer(self, prefix, visual, suffix, answer, kept):
        """Logits [1 + len(answer), V] of the prompt's last row and of each answer token.

        On the full sequence, numbered from 0, where no row sees a visual token that is not kept.
        """
        rows = torch.cat([self.embed(prefix), visual, self.embed(suffix), self.embed(answer)])
        hidden = torch.zeros(len(rows), dtype=torch.bool)
        hidden[len(prefix) : len(prefix) + len(visual)] = True
        hidden[len(prefix) + torch.as_tensor(kept)] = False
        mask = torch.full((len(rows), len(rows)), -torch.inf, dtype=torch.float64).triu(1)
        mask[:, hidden] = -torch.inf
        # A hidden row may see itself, or its softmax would have nothing to weigh.
        mask.fill_diagonal_(0.0)
        logits = self.logits(rows, torch.arange(len(rows)), mask)
        return logits[len(rows) - len(answer) - 1 :]

    def logits(self, rows, position_ids, mask=None):
        """Logits [S, V] of embeddings [S, D]; causal by slot without a mask."""
        if self.run is not None:
            return self.run(rows, position_ids, mask)
        return published.llama_logits(
            self.decoder,
            rows,
            position_ids,
            mask,
            heads=self.heads,
            theta=self.theta,
            eps=self.eps,
        )


def find_truth(case):
    """The truth about a family of tests/makers/families.py; a new one needs one."""
    if case.name not in _MAKERS:
        pytest.fail(
            f"no truth about '{case.name}': add what its towers and its decoder see and answer, "
            "of the library's own classes, to _MAKERS of tests/truths/families.py"
        )
    return _MAKERS[case.name](case)


# LLaVA.


def _llava(case):
    model = LlavaForConditionalGeneration.from_pretrained(
        case.files, dtype=torch.float64, attn_implementation="eager"
    ).eval()

    @torch.no_grad()
    def look(pixels, size, phrase):
        del size
        pixels = torch.as_tensor(pixels).double()
        tokens = model.model.get_image_features(pixels, return_dict=True).pooler_output[0]
        side = range(len(tokens))
        clip = case.text["parts.clip"]
        return _see_clip(model.model.vision_tower, pixels, list(side), tokens, clip, phrase)

    return FamilyTruth(
        look=look,
        project=model.model.multi_modal_projector,
        decoder=_library_decoder(case.files),
        heads=6,
        eps=1e-6,
    )


def _llava_original(case):
    clip = case.overrides["parts.clip"]
    tower = CLIPVisionModel.from_pretrained(
        clip, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    tensors = originals.read_folder(case.files)

    @torch.no_grad()
    def look(pixels, size, phrase):
        del size
        pixels = torch.as_tensor(pixels).double()
        tokens = published.llava_visual_tokens(clip, tensors, pixels)[0]
        return _see_clip(tower, pixels, list(range(len(tokens))), tokens, clip, phrase)

    def project(rows):
        rows = torch.nn.functional.gelu(_linear(rows, tensors, "model.mm_projector.0"))
        return _linear(rows, tensors, "model.mm_projector.2")

    return FamilyTruth(look=look, project=project, decoder=_only_llama(tensors), heads=6)


def _next(heads, theta):
    def make(case):
        model = LlavaNextForConditionalGeneration.from_pretrained(
            case.files, dtype=torch.float64, attn_implementation="eager"
        ).eval()

        @torch.no_grad()
        def look(pixels, size, phrase):
            pixels = torch.as_tensor(pixels).double()
            sizes = torch.tensor([[size[1], size[0]]])
            output = model.model.get_image_features(pixels, sizes, return_dict=True)
            origin = _packed_origin(model.config, sizes)
            return _see_clip(
                model.model.vision_tower,
                pixels[0],
                origin,
                output.pooler_output[0],
                case.text["parts.clip"],
                phrase,
            )

        return FamilyTruth(
            look=look,
            project=model.model.multi_modal_projector,
            decoder=_library_decoder(case.files),
            heads=heads,
            theta=theta,
        )

    return make


def _packed_origin(config, sizes):
    """Which patch of all views each packed token shows, or NEWLINE: by the library's packing."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    height, width = select_best_resolution(sizes[0].tolist(), config.image_grid_pinpoints)
    views = 1 + (height // vision.image_size) * (width // vision.image_size)
    features = torch.arange(views * patches).reshape(views, patches, 1)
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], sizes, "default", torch.tensor([NEWLINE])
    )
    return packed[0][:, 0].tolist()


# Shikra.


def _shikra(case):
    clip = case.files.clip
    tower = CLIPVisionModel.from_pretrained(
        clip, dtype=torch.float64, attn_implementation="eager"
    ).eval()

    @torch.no_grad()
    def look(pixels, size, phrase):
        del size
        pixels = torch.as_tensor(pixels).double()
        tokens = published.shikra_visual_tokens(clip, case.files.merged, pixels)[0]
        return _see_clip(tower, pixels, list(range(len(tokens))), tokens, clip, phrase)

    return FamilyTruth(
        look=look,
        project=lambda rows: _linear(rows, case.files.merged, "model.mm_projector"),
        decoder=_only_llama(case.files.merged),
        heads=7,
        eps=1e-6,
    )


# MiniGPT-v2.


def _minigpt(case):
    files = case.files
    eva = torch.load(files.eva, weights_only=True)
    model = torch.load(files.checkpoint, weights_only=True)["model"]
    llama = _only_llama(originals.read_folder(files.llama))
    decoder = published.minigpt_llama(llama, model, files.lora_alpha)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(files.llama / "tokenizer.model")
    )

    @torch.no_grad()
    def look(pixels, size, phrase):
        del size
        pixels = torch.as_tensor(pixels).double()
        side = pixels.shape[-1] // eva["patch_embed.proj.weight"].shape[-1]
        layers = files.vision_layers
        output = published.eva_tower(eva, pixels, files.vision_heads, side, layers=layers)
        width = output.states[-1].shape[-1]
        tokens = published.minigpt_visual_tokens(
            eva, model, pixels, files.vision_heads, side, layers=layers
        )[0]
        affine = [
            model.get(f"ln_vision.{name}", default).double()
            for name, default in (("weight", torch.ones(width)), ("bias", torch.zeros(width)))
        ]
        states = torch.nn.functional.layer_norm(output.states[-1][0], (width,), *affine, 1e-5)
        attention = truth.cls_attention(output.attentions[-1][0].numpy(), 0).scores
        similarity = truth.cls_similarity(states[0].numpy(), states[1:].numpy(), 0).scores
        rows = decoder["model.embed_tokens.weight"][processor.encode(phrase)].numpy()
        # There is no block after the last one, which merging goes by then.
        query, keys = output.queries[-1][0, 0], output.keys[-1][0]
        a = truth._one_head_attention(query.numpy(), keys.numpy())
        by_head = keys[1:].unflatten(-1, (files.vision_heads, -1)).mean(1)
        return Seen(
            tokens=tokens,
            removable=list(range(len(tokens))),
            attention=truth.pool(attention, 4),
            column_attention=truth.pool(output.attentions[-1][0].mean((0, 1))[1:].numpy(), 4),
            similarity=truth.pool(similarity, 4),
            mean_keys=truth.pool(by_head.numpy(), 4),
            one_head_attention=truth.pool(a, 4),
            merge_keys=truth.pool(keys[1:].numpy(), 4),
            patches=states[1:].reshape(len(tokens), -1),
            text=torch.tensor(np.mean(truth.unit_rows(rows), axis=0)),
            text_patches=torch.tensor(np.array(truth.unit_rows(tokens.numpy()))),
            text_sign=1,
        )

    return FamilyTruth(
        look=look,
        project=lambda rows: _linear(rows, model, "llama_proj"),
        decoder=decoder,
        heads=4,
    )


# InternVL.


def _internvl(heads):
    def make(case):
        model = InternVLForConditionalGeneration.from_pretrained(
            case.files, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(case.files)
        decoder = _library_decoder(case.files)
        decoder.setdefault("lm_head.weight", decoder["model.embed_tokens.weight"])
        tower, vision = model.model.vision_tower, model.config.vision_config
        side, cell = vision.image_size[0] // vision.patch_size[0], 2

        @torch.no_grad()
        def look(pixels, size, phrase):
            del size
            views = torch.as_tensor(pixels).double()[0]
            output = tower(views, output_hidden_states=True, output_attentions=True)
            states, before = output.last_hidden_state, output.hidden_states[-2]
            features = model.model.get_image_features(views, return_dict=True).pooler_output
            tokens = features.flatten(0, 1)
            order = [
                view * side * side + (top + row) * side + left + column
                for view in range(len(views))
                for top in range(0, side, cell)
                for left in range(0, side, cell)
                for row in range(cell)
                for column in range(cell)
            ]
            last = tower.encoder.layer[-1]
            normed = last.layernorm_before(before)
            queries = last.attention.q_norm(last.attention.q_proj(normed))[:, 0]
            keys = last.attention.k_norm(last.attention.k_proj(normed))
            # There is no block after the last one, which merging goes by then.
            a = [
                truth._one_head_attention(query.numpy(), view.numpy())
                for query, view in zip(queries, keys, strict=True)
            ]
            attention = [
                truth.cls_attention(view.numpy(), 0).scores for view in output.attentions[-1]
            ]
            similarity = [
                truth.cls_similarity(view[0].numpy(), view[1:].numpy(), 0).scores
                for view in states
            ]
            by_head = keys[:, 1:].unflatten(-1, (heads, -1)).mean(2).flatten(0, 1)
            patches = states[:, 1:].flatten(0, 1)[order]
            rows = decoder["model.embed_tokens.weight"][
                tokenizer(phrase, add_special_tokens=False).input_ids
            ].double()
            return Seen(
                tokens=tokens,
                removable=list(range(len(tokens))),
                attention=truth.pool(np.concatenate(attention)[order], cell**2),
                similarity=truth.pool(np.concatenate(similarity)[order], cell**2),
                column_attention=truth.pool(
                    output.attentions[-1].mean((1, 2))[:, 1:].flatten()[order].numpy(), cell**2
                ),
                mean_keys=truth.pool(by_head[order].numpy(), cell**2),
                one_head_attention=truth.pool(np.concatenate(a)[order], cell**2),
                merge_keys=truth.pool(keys[:, 1:].flatten(0, 1)[order].numpy(), cell**2),
                patches=patches.reshape(len(tokens), -1),
                text=torch.tensor(np.mean(truth.unit_rows(rows.numpy()), axis=0)),
                text_patches=torch.tensor(np.array(truth.unit_rows(tokens.numpy()))),
                text_sign=1,
            )

        return FamilyTruth(
            look=look,
            project=model.model.multi_modal_projector,
            decoder=decoder,
            heads=6,
            run=_run_library(model),
        )

    return make


# LLaVA-OneVision.


def _onevision(case):
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        case.files, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(case.files)
    decoder = _library_decoder(case.files)
    decoder.setdefault("lm_head.weight", decoder["model.embed_tokens.weight"])

    @torch.no_grad()
    def look(pixels, size, phrase):
        pixels = torch.as_tensor(pixels).double()
        sizes = torch.tensor([[size[1], size[0]]])
        rule = model.config.vision_aspect_ratio
        features = model.model.get_image_features(pixels, sizes, return_dict=True)
        tokens = features.pooler_output[0]
        output = model.model.vision_tower(pixels[0], output_attentions=True)
        column = output.attentions[-1].mean((1, 2))[..., None]
        marked, _ = model.model.pack_image_features(
            [column], sizes, torch.tensor([torch.nan]), vision_aspect_ratio=rule
        )
        shown = ~marked[0][:, 0].isnan()
        patches = tokens[shown]
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        rows = decoder["model.embed_tokens.weight"][ids].double().numpy()
        none = np.empty(0)
        return Seen(
            tokens=tokens,
            removable=shown.nonzero()[:, 0].tolist(),
            # What serves in the place of CLS's.
            attention=marked[0][shown, 0].numpy(),
            similarity=none,
            column_attention=marked[0][shown, 0].numpy(),
            mean_keys=none,
            one_head_attention=none,
            merge_keys=none,
            patches=patches,
            text=torch.tensor(np.mean(truth.unit_rows(rows), axis=0)),
            text_patches=torch.tensor(np.array(truth.unit_rows(patches.numpy()))),
            text_sign=1,
        )

    return FamilyTruth(
        look=look,
        project=lambda rows: rows,
        decoder=decoder,
        heads=6,
        run=_run_library(model),
    )


_MAKERS = {
    "llava": _llava,
    "llava-original": _llava_original,
    "llava-next-vicuna": _next(heads=6, theta=1e4),
    "llava-next-mistral": _next(heads=9, theta=1e6),
    "shikra": _shikra,
    "minigpt-v2": _minigpt,
    "internvl3": _internvl(heads=3),
    "internvl3.5": _internvl(heads=5),
    "llava-onevision": _onevision,
}


# Pieces.


def _see_clip(tower, views, origin, tokens, clip_folder, phrase):
    """What pruners look at in the views [V, 3, H, W]; `origin` is the patch of each token."""
    output = tower(views, output_hidden_states=True, output_attentions=True)
    states, maps = output.hidden_states[-2], output.attentions[-2]
    removable = [index for index, patch in enumerate(origin) if patch != NEWLINE]
    shown = [origin[index] for index in removable]
    attention = [truth.cls_attention(view.numpy(), 0).scores for view in maps]
    similarity = [
        truth.cls_similarity(view[0].numpy(), view[1:].numpy(), 0).scores for view in states
    ]
    patches = states[:, 1:].flatten(0, 1)[shown]
    last, after = tower.encoder.layers[-2:]
    heads = last.self_attn.num_heads
    keys = last.self_attn.k_proj(last.layer_norm1(output.hidden_states[-3]))[:, 1:]
    normed = after.layer_norm1(states)
    queries, merge_keys = (after.self_attn.q_proj(normed[:, 0]), after.self_attn.k_proj(normed))
    a = [
        truth._one_head_attention(query.numpy(), view.numpy())
        for query, view in zip(queries, merge_keys, strict=True)
    ]
    clip = CLIPModel.from_pretrained(
        clip_folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    ids = tokenizer(phrase, truncation=True, max_length=77, return_tensors="pt").input_ids
    return Seen(
        tokens=tokens,
        removable=removable,
        attention=np.concatenate(attention)[shown],
        column_attention=maps.mean((1, 2))[:, 1:].flatten()[shown].numpy(),
        similarity=np.concatenate(similarity)[shown],
        mean_keys=keys.unflatten(-1, (heads, -1)).mean(2).flatten(0, 1)[shown].numpy(),
        one_head_attention=np.concatenate(a)[shown],
        merge_keys=merge_keys[:, 1:].flatten(0, 1)[shown].numpy(),
        patches=patches,
        text=clip.text_projection(clip.text_model(ids).pooler_output)[0],
        text_patches=clip.visual_projection(tower.post_layernorm(patches)),
        text_sign=-1,
    )


def _run_library(model):
    """What asks the library's own decoder: rows, position IDs and a mask to logits."""

    @torch.no_grad()
    def run(rows, position_ids, mask):
        if mask is None:
            mask = torch.full((len(rows), len(rows)), -torch.inf, dtype=torch.float64).triu(1)
        hidden = model.model.language_model(
            inputs_embeds=rows[None],
            position_ids=position_ids[None],
            attention_mask=mask[None, None],
            use_cache=False,
        ).last_hidden_state[0]
        return model.lm_head(hidden)

    return run


def _linear(rows, tensors, name):
    weight, bias = (tensors[f"{name}.{part}"].double() for part in ("weight", "bias"))
    return torch.nn.functional.linear(rows, weight, bias)


def _library_decoder(folder):
    """The decoder's tensors of a LLaVA in Hugging Face's layout of any time."""
    renamed = {}
    for name, value in originals.read_folder(folder).items():
        for old, new in (
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
            ("lm_head.", "lm_head."),
        ):
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = value
                break
    return renamed


def _only_llama(tensors):
    starts = ("model.layers", "model.embed_tokens", "model.norm", "lm_head")
    return {
        name: value
        for name, value in tensors.items()
        if name.startswith(starts) and not name.endswith("inv_freq")
    }
