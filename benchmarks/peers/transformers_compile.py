"""transformers in PyTorch with a static cache and torch.compile."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from measure import CAPACITY, find_versions, make_pixels, make_tokens, measure_session, run

NAME: Final = "transformers compile"
SCOPE: Final = "whole"
PRECISIONS: Final = ("fp32",)
_PROMPTS: Final = (624, 336)


class Compiled:
    """A model in float32, compiled for each length that it is called with."""

    def __init__(self, checkpoint: Path, threads: int, prompts: tuple[int, ...]) -> None:
        """Load the checkpoint and compile; what was compiled before is found in the cache."""
        import torch
        from transformers import LlavaForConditionalGeneration, StaticCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._model = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True
        ).eval()
        config = self._model.config.get_text_config()
        self._cache = StaticCache(config=config, max_cache_len=CAPACITY)
        self._forward = torch.compile(self._decode, dynamic=False)
        self._look = torch.compile(self._picture, dynamic=False)
        self._pixels = torch.from_numpy(make_pixels())
        for count in prompts:
            self.step(self.prefill(make_tokens(count)), count)
        self.see()

    def prefill(self, token_ids: np.ndarray) -> int:
        """See measure.Session."""
        self._cache.reset()
        return self._run(self._torch.from_numpy(token_ids)[None], 0)

    def step(self, token: int, position: int) -> int:
        """See measure.Session."""
        return self._run(self._torch.tensor([[token]]), position)

    def see(self) -> Any:
        """The visual tokens of a picture."""
        return self._look(self._pixels)

    def _run(self, token_ids: Any, start: int) -> int:
        positions = self._torch.arange(start, start + token_ids.shape[1])[None]
        return int(self._forward(token_ids, positions)[0, -1].argmax())

    def _decode(self, token_ids: Any, positions: Any) -> Any:
        given = self._model(
            input_ids=token_ids,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return given.logits

    def _picture(self, pixels: Any) -> Any:
        return self._model.get_image_features(pixels, return_dict=True).pooler_output


def _open(checkpoint: Path, out: Path, threads: int, prompts: tuple[int, ...]) -> Compiled:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out.resolve())
    return Compiled(checkpoint, threads, prompts)


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Fill the compiler's cache, which later processes read."""
    options.out.mkdir(parents=True, exist_ok=True)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    _open(options.checkpoint, options.out, threads, _PROMPTS)
    return {
        "converts": False,
        "note": "one compilation for each length; its cache is filled beforehand",
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the compiled model."""
    import torch  # noqa: F401 - loading libraries is not loading the model
    from transformers import LlavaForConditionalGeneration, StaticCache  # noqa: F401

    return measure_session(
        lambda: _open(options.checkpoint, options.out, options.threads, tuple(options.prompts)),
        options,
        see=Compiled.see,
        versions=find_versions("torch", "transformers"),
        note="loading includes tracing and reading compiled code",
    )


if __name__ == "__main__":
    run(prepare, measure)
