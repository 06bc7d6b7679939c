"""Names and shapes of the models of export_configs/, for `--dry-run` without network.

python -m benchmarks.shapes          # writes gap_export/checkpoint/shapes.json
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from benchmarks.checkpoints import (
    CLIP_TEXT,
    LLAMA_7B,
    LLAMA_13B,
    MISTRAL_7B,
    clip_shapes,
    eva_shapes,
    library_config,
    library_shapes,
    lora_shapes,
    shikra_config,
    vision_config,
)
from benchmarks.command import run_benchmark
from benchmarks.qwen import QWEN, qwen_shapes
from benchmarks.tiled import (
    INTERNVL,
    ONEVISION,
    Shapes,
    internvl_config,
    internvl_shapes,
    llama_shapes,
    onevision_config,
    onevision_shapes,
)
from gap_export.checkpoint.shapes import SHAPES_FILE
from gap_runtime.cli.options import ArgumentParser

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def make_shapes() -> dict[str, Any]:
    """What is known of each checkpoint, by the location that configurations name."""
    found = {}
    for location, kind, text in (
        ("llava-hf/llava-1.5-7b-hf", "llava", LLAMA_7B),
        ("llava-hf/llava-1.5-13b-hf", "llava", LLAMA_13B),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next", LLAMA_7B),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", MISTRAL_7B),
    ):
        wide = text | {"vocab_size": 32064}
        found[location] = _describe(library_shapes(kind, wide), library_config(kind, wide))
    for location, side in (
        ("openai/clip-vit-large-patch14", 224),
        ("openai/clip-vit-large-patch14-336", 336),
    ):
        vision = vision_config(side)
        config = {"model_type": "clip", "projection_dim": 768}
        config |= {"vision_config": vision, "text_config": CLIP_TEXT}
        shapes = clip_shapes(vision, "vision_model.") | clip_shapes(CLIP_TEXT, "text_model.")
        shapes |= {"visual_projection.weight": (768, 1024), "text_projection.weight": (768, 768)}
        found[location] = _describe(shapes | {"logit_scale": ()}, config)
    delta = shikra_config()
    shapes = llama_shapes(delta, "model.", "lm_head.weight")
    shapes |= {"model.mm_projector.weight": (4096, 1024), "model.mm_projector.bias": (4096,)}
    found["shikras/shikra-7b-delta-v1"] = _describe(shapes, delta)
    base = LLAMA_7B | {"rms_norm_eps": 1e-6}
    llama = llama_shapes(LLAMA_7B, "model.", "lm_head.weight")
    # By its last norm a family tells a model from differences to one.
    found["huggyllama/llama-7b"] = _describe(llama, base) | {"ones": ["model.norm.weight"]}
    found["meta-llama/Llama-2-7b-chat-hf"] = _describe(llama, LLAMA_7B)
    found["minigpt-v2"] = _describe(lora_shapes(), dtype="float32")
    found["eva_vit_g.pth"] = _describe(eva_shapes())
    for location, config in QWEN.values():
        found[location] = _describe(qwen_shapes(config), config, "bfloat16")
    for name, text in INTERNVL.items():
        version, _, size = name.removeprefix("internvl").partition("-")
        # Both are what export_configs/ say.
        ending = "hf" if version == "3" else "HF"
        location = f"OpenGVLab/InternVL{version.replace('.', '_')}-{size.upper()}-{ending}"
        found[location] = _describe(internvl_shapes(text), internvl_config(text))
    for name, text in ONEVISION.items():
        shapes, config = onevision_shapes(text), onevision_config(text)
        found[f"llava-hf/{name}-ov-hf"] = _describe(shapes, config)
    return found


def _describe(
    shapes: Shapes, config: dict[str, Any] | None = None, dtype: str = "float16"
) -> dict[str, Any]:
    """A checkpoint with the names of layers drawn together, `{n}` for the numbers below n."""
    together: dict[str, list[str]] = {}
    for name in shapes:
        together.setdefault(_NUMBER.sub("{}", name, count=1), []).append(name)
    tensors: dict[str, list[int]] = {}
    for pattern, names in together.items():
        count, shape = len(names), list(shapes[names[0]])
        if names == [pattern.replace("{}", str(k)) for k in range(count)] and all(
            list(shapes[name]) == shape for name in names
        ):
            tensors[pattern.replace("{}", f"{{{count}}}")] = shape
        else:
            # Numbers of other things than layers.
            tensors |= {name: list(shapes[name]) for name in names}
    files = {} if config is None else {"config.json": config}
    return {"dtype": dtype, "files": files, "tensors": tensors}


def dump_shapes() -> str:
    """The file's text: a line for each tensor."""
    text = json.dumps(make_shapes(), indent=1)
    return re.sub(r"\[\s+([\d,\s]*?)\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def main() -> None:
    """Command line."""
    ArgumentParser(description="write the shapes of checkpoints").parse_args()
    SHAPES_FILE.write_text(dump_shapes(), encoding="utf-8")
    print(SHAPES_FILE)


if __name__ == "__main__":
    run_benchmark(main)
