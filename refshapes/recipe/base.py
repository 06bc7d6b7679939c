"""What the recipes of both models share: tokenizer, model, answers, the folder that is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WIDTH: Final = 128
HEAD_DIM: Final = 32
EPSILON: Final = 1e-6
FILL: Final = (122, 116, 104)
PROMPT_BEFORE: Final = "USER: "
PROMPT_AFTER: Final = "\nWhere is {phrase}? ASSISTANT:"
IGNORED: Final = -100
MOST_THREADS: Final = 1024


def train_tokenizer(corpus: list[str], isolated: list[str]) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer in Llama's form, trained on phrases and answers.

    Args:
        corpus: Phrases; the answers' form is added to it.
        isolated: Patterns of what is a token of its own.
    """
    corpus = [*corpus, *(f"[0.{k:02d}, 1.{k:02d}, 0.00, 1.00]" for k in range(100))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in isolated),
            pre_tokenizers.Split(Regex("\u2581"), "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    trainer = BpeTrainer(
        vocab_size=512,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 4, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, side: int, patch: int, layers: int
) -> LlavaForConditionalGeneration:
    """The untrained LLaVA, its vision position embedding frozen at zero.

    Args:
        tokenizer: Of the model.
        side: Of the picture, in pixels.
        patch: Of a patch, in pixels.
        layers: Of the decoder.
    """
    grid = side // patch
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        projection_dim=96,
        initializer_range=0.02,
    )
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // HEAD_DIM,
        num_key_value_heads=WIDTH // HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=EPSILON,
        rope_parameters={
            "rope_type": "default",
            # Rotary pair 1 turns once per row of the grid.
            "rope_theta": (2 * math.pi / grid) ** (-HEAD_DIM / 2),
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=grid * grid,
        tie_word_embeddings=False,
    )
    config.image_token_id = config.image_token_index
    model = LlavaForConditionalGeneration(config)
    table = model.model.vision_tower.embeddings.position_embedding.weight
    nn.init.zeros_(table)
    table.requires_grad = False
    return model


def encode_prompt(tokenizer: PreTrainedTokenizerFast, phrase: str) -> tuple[list[int], list[int]]:
    """Token IDs before and after the image, of the question about a phrase."""
    ids = tokenizer(PROMPT_BEFORE + "<image>" + PROMPT_AFTER.format(phrase=phrase))["input_ids"]
    at = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
    return ids[:at], ids[at + 1 :]


def place_loss(logits: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of row and column; logits [..., 2 * grid], places [..., 2]."""
    split = logits.unflatten(-1, (2, -1)).flatten(0, -2)
    return functional.cross_entropy(split, places.flatten(), ignore_index=IGNORED)


def write_checkpoint(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    side: int,
    out: Path,
) -> None:
    """The checkpoint folder: config, safetensors, tokenizer, processor config."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(out)
