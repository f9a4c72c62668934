"""Checkpoint families: which tensors a file must hold, and how they are read without holding the whole in memory."""
