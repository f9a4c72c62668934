"""Frames and documents as the tensors that the model takes: of training and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flamingo_reference.config import ModelConfig
from flamingo_reference.nano import pages, pictures


def to_pixels(images: list[pictures.Pixels], config: ModelConfig) -> Tensor:
    """uint8 images [I, I, 3] to normalised float32 [F, 3, I, I]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (stacked - torch.tensor(config.pixel_mean)[:, None, None]) / torch.tensor(config.pixel_std)[:, None, None]


def collate(documents: Sequence[pages.Encoded]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """token_ids [B, S], phi [B, S], loss [B, S], media_rows [B, M] and the distinct media, in bank order."""
    length, most = max(len(doc.token_ids) for doc in documents), max(1, *(len(doc.media) for doc in documents))
    tokens = torch.zeros(len(documents), length, dtype=torch.long)
    phi, loss = torch.zeros_like(tokens), torch.zeros(len(documents), length, dtype=torch.bool)
    rows = torch.zeros(len(documents), most, dtype=torch.long)
    bank: dict[int, int] = {}
    for row, document in enumerate(documents):
        size = len(document.token_ids)
        tokens[row, :size] = torch.from_numpy(document.token_ids)
        phi[row, :size] = torch.from_numpy(document.phi)
        loss[row, :size] = torch.from_numpy(document.loss)
        for place, medium in enumerate(document.media):
            rows[row, place] = bank.setdefault(medium, len(bank))
    return tokens, phi, loss, rows, list(bank)
