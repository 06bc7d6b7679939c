"""A language model of Hugging Face's, asked row by row, with its own tokenizer and cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gap_export.checkpoint.tokenizer_files import TokenizerFiles
from gap_export.interfaces.family import InputStatistics
from gap_export.reference.tokenizer import EagerTokenizer
from gap_runtime.grounding.prompt import IMAGE_FIELD

# D decoder width, S rows, V vocabulary, G key/value heads, T cached rows, d head width.


class EagerLlama:
    """A decoder, its head, embeddings and tokenizer."""

    def __init__(
        self,
        decoder: nn.Module,
        head: nn.Module,
        tokenizer: TokenizerFiles,
        *,
        image_token_id: int | None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            decoder: The library's model without its head.
            head: Hidden states to logits.
            tokenizer: Its files.
            image_token_id: Token that stands for the picture; None where the tokenizer has none
                and prompts hold `<image>`.
        """
        self._decoder, self._head = decoder.eval(), head
        self._tokenizer = EagerTokenizer(tokenizer)
        self._image_token_id = image_token_id

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self._decoder.parameters()).dtype

    def encode(self, prompt: str) -> tuple[list[int], list[int]]:
        """Token IDs before and after the picture."""
        if self._image_token_id is None:
            before, _, after = prompt.partition(IMAGE_FIELD)
            return (
                self._tokenizer.encode(before, special=True),
                self._tokenizer.encode(after, special=False),
            )
        ids = self._tokenizer.encode(prompt, special=True)
        at = ids.index(self._image_token_id)
        return ids[:at], ids[at + 1 :]

    def encode_phrase(self, phrase: str) -> list[int]:
        """Token IDs of a phrase alone, without special tokens."""
        return self._tokenizer.encode(phrase, special=False)

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(token_ids)

    @torch.no_grad()
    def embed(self, token_ids: list[int]) -> Tensor:
        """Token embeddings [S, D]."""
        table: Any = self._decoder.get_input_embeddings()  # type: ignore[operator]
        rows: Tensor = table(torch.tensor(token_ids, dtype=torch.int64))
        return rows

    def rotary_frequencies(self) -> list[float]:
        """Angle by which each rotary pair turns in a step, in radians."""
        rotary: Any = self._decoder.rotary_emb
        frequencies: list[float] = rotary.inv_freq.double().tolist()
        return frequencies

    def start_cache(self) -> Any:
        """An empty cache of the library's own kind."""
        return DynamicCache()

    def read_cache(self, cache: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that a cache holds, by layer: [G, T, d]."""
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    @torch.no_grad()
    def run_decoder(self, embeddings: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [V] of the last row; each row sees the cache and the rows before it.

        The library takes position IDs as [1, S], or as [axes, 1, S] where there are several.
        """
        embeddings, more = self.split_planes(embeddings)
        rows, seen = len(embeddings), cache.get_seq_length()
        # An explicit mask: without one the library takes gaps in the position IDs for the
        # borders of packed sequences.
        hidden = torch.full((rows, seen + rows), torch.finfo(self.dtype).min)
        mask = hidden.triu(seen + 1).to(self.dtype)[None, None]
        output = self._decoder(
            inputs_embeds=embeddings[None],
            position_ids=position_ids if len(position_ids) == 1 else position_ids[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        logits: Tensor = self._head(output.last_hidden_state[0, -1])
        return logits.float()

    def split_planes(self, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The embeddings in the decoder's rows, and what the library takes besides."""
        return rows, {}

    @contextmanager
    def observe(self) -> Iterator[Callable[[], dict[str, InputStatistics]]]:
        """Watch the inputs of all linear layers, by the canonical name of the weight."""
        layers = {f"language_model.{name}": layer for name, layer in self._decoder.named_modules()}
        watched = {
            f"{name}.weight": _InputWatch(layer)
            for name, layer in {**layers, "lm_head": self._head}.items()
            if isinstance(layer, nn.Linear)
        }
        try:
            yield lambda: {name: watch.summarize() for name, watch in watched.items()}
        finally:
            for watch in watched.values():
                watch.end()


class _InputWatch:
    """Sums over the inputs of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self._count = 0
        self._sizes = torch.zeros(layer.in_features, dtype=torch.float64)
        self._squares = torch.zeros(layer.in_features, dtype=torch.float64)
        self._handle = layer.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        self._count += len(rows)
        self._sizes += rows.abs().sum(dim=0)
        self._squares += rows.square().sum(dim=0)

    def summarize(self) -> InputStatistics:
        return InputStatistics(
            mean_size=self._sizes / max(self._count, 1),
            mean_square=self._squares / max(self._count, 1),
        )

    def end(self) -> None:
        self._handle.remove()
