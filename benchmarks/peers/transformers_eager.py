"""transformers in PyTorch as it comes: eager, sdpa attention, a growing cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from measure import find_versions, make_pixels, measure_session, run

NAME: Final = "transformers eager"
SCOPE: Final = "whole"
PRECISIONS: Final = ("fp32",)


class Eager:
    """A model in float32."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        """Load the checkpoint."""
        import torch
        from transformers import DynamicCache, LlavaForConditionalGeneration

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._make_cache = DynamicCache
        self._model = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True
        ).eval()
        self._cache = DynamicCache()
        self._pixels = torch.from_numpy(make_pixels())

    def prefill(self, token_ids: np.ndarray) -> int:
        """See measure.Session."""
        self._cache = self._make_cache()
        return self._run(self._torch.from_numpy(token_ids)[None], 0)

    def step(self, token: int, position: int) -> int:
        """See measure.Session."""
        return self._run(self._torch.tensor([[token]]), position)

    def see(self) -> Any:
        """The visual tokens of a picture."""
        return self._model.get_image_features(self._pixels)

    def _run(self, token_ids: Any, start: int) -> int:
        positions = self._torch.arange(start, start + token_ids.shape[1])[None]
        with self._torch.inference_mode():
            given = self._model(
                input_ids=token_ids,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return int(given.logits[0, -1].argmax())


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Nothing: it runs the checkpoint."""
    options.out.mkdir(parents=True, exist_ok=True)
    return {"converts": False, "note": "runs the checkpoint as it is"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the model."""
    import torch  # noqa: F401 - loading libraries is not loading the model
    from transformers import LlavaForConditionalGeneration  # noqa: F401

    return measure_session(
        lambda: Eager(options.checkpoint, options.threads),
        options,
        see=Eager.see,
        versions=find_versions("torch", "transformers"),
    )


if __name__ == "__main__":
    run(prepare, measure)
