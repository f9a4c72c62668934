"""The reference model in PyTorch: one file per subgraph. Importing anything of this package imports torch."""

from flamingo_reference.model.flamingo import Flamingo, MediaKV, numpy_from_torch, torch_from_numpy

__all__ = ["Flamingo", "MediaKV", "numpy_from_torch", "torch_from_numpy"]
