"""Small random checkpoints in the files that the models were published in.

Same key names, nesting, containers, dtypes, shards and tokenizer files as the real downloads, only
smaller: what a reader of the real files needs is here, and what it must not trip over too (rotary
buffers, position numbers, heads nobody uses, a spare block, an optimizer, wrong token numbers).

| maker | as published in |
|---|---|
| `make_sentencepiece` | the tokenizer files of Vicuna and LLaMA |
| `make_tokenizer_json` | the same as fast tokenizers of several times saved it |
| `make_clip` | openai/clip-vit-large-patch14-336 |
| `make_llava_original` | liuhaotian/llava-v1.5-7b |
| `make_llava_next` | llava-hf/llava-v1.6-vicuna-7b-hf, llava-hf/llava-v1.6-mistral-7b-hf |
| `make_llava_onevision` | llava-hf/llava-onevision-qwen2-0.5b-ov-hf |
| `make_adapter` | adapters of PEFT, from 0.4 to today |
| `make_llava_lora`, `make_vicuna` | liuhaotian/llava-v1.5-7b-lora, lmsys/vicuna-7b-v1.5 |
| `make_shikra` | shikras/shikra-7b-delta-v1, a LLaMA, openai/clip-vit-large-patch14 |
| `make_internvl` | OpenGVLab/InternVL3-1B-hf, OpenGVLab/InternVL3_5-1B-HF |
| `make_minigpt` | minigptv2_checkpoint.pth, LAVIS' eva_vit_g.pth, meta-llama/Llama-2-7b-chat-hf |
"""

from makers.originals.adapters import (
    make_adapter,
    make_llava_lora,
    make_vicuna,
    merge_adapter,
    read_adapter,
)
from makers.originals.clip import CLIP_MEAN, CLIP_STD, make_clip
from makers.originals.files import read_folder
from makers.originals.internvl import make_internvl
from makers.originals.llava import make_llava_original
from makers.originals.llava_next import make_llava_next
from makers.originals.llava_onevision import make_llava_onevision
from makers.originals.minigpt import MinigptFiles, make_minigpt
from makers.originals.shikra import ShikraFiles, make_shikra
from makers.originals.tokenizers import make_sentencepiece, make_tokenizer_json

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "MinigptFiles",
    "ShikraFiles",
    "make_adapter",
    "make_clip",
    "make_internvl",
    "make_llava_lora",
    "make_llava_next",
    "make_llava_onevision",
    "make_llava_original",
    "make_minigpt",
    "make_sentencepiece",
    "make_shikra",
    "make_tokenizer_json",
    "make_vicuna",
    "merge_adapter",
    "read_adapter",
    "read_folder",
]
