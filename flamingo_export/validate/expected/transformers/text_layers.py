"""What the language models of transformers' families have in common: the ends, and a layer on a whole text."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Ends:
    """Before the first layer and after the last. text: the module with embed_tokens and norm."""

    def __init__(self, text: Any, head: Any) -> None:
        self._text, self._head = text, head

    def embedding(self, token_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, W]."""
        embedded: Tensor = self._text.embed_tokens(token_ids)
        return embedded

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, V]."""
        logits: Tensor = self._head(self._text.norm(hidden))
        return logits


class Layer:
    """A self-attention layer on a whole text. rotary: what makes its position embeddings, None where it does so itself."""

    def __init__(self, layer: Any, rotary: Any = None) -> None:
        self._layer, self._rotary = layer, rotary
        # transformers 5.24 renamed the argument.
        self._cache = "cache" if "cache" in inspect.signature(layer.forward).parameters else "past_key_values"

    def __call__(self, hidden: Tensor) -> Tensor:
        """[1, S, W] -> [1, S, W]."""
        return self._run(hidden, None)

    def qkv(self, hidden: Tensor) -> tuple[None, Tensor, Tensor]:
        """None for the queries, which nobody asks for; keys and values [1, G, S, D] as they are cached."""
        from transformers import DynamicCache

        cache = DynamicCache()
        self._run(hidden, cache)
        written = cache.layers[self._layer.self_attn.layer_idx]
        return None, written.keys, written.values

    def _run(self, hidden: Tensor, cache: Any) -> Tensor:
        length = hidden.shape[1]
        mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
        places = torch.arange(length)[None]
        named: dict[str, Any] = {self._cache: cache}
        if self._rotary is not None:
            named["position_embeddings"] = self._rotary(hidden, places)
        return hidden_of(self._layer(hidden, attention_mask=mask[None, None], position_ids=places, **named))


def hidden_of(output: Any) -> Tensor:
    """What a layer returns: hidden states, which some versions put into a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
