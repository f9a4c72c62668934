"""Parity against transformers: expected values from its own IDEFICS, run whole or part by part on the checkpoint's tensors."""
