"""A small Flamingo that is really trained: its data, recipe, evaluation and checkpoint. Importing this does not import torch."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the trained checkpoint, in our own format."""
