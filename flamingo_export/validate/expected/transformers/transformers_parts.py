"""transformers' model part by part, behind the interface of the reference's parts: the same cases are asked of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flamingo_export.errors import ParityError
from flamingo_export.precision import StorageType
from flamingo_export.sources import CheckpointSource
from flamingo_export.validate.expected.reference_parts import InFp64, Rounded
from flamingo_export.validate.expected.rounding import as_stored, rounded_names
from flamingo_export.validate.expected.transformers.streamed import StreamedModel
from flamingo_export.validate.expected.transformers.theirs import theirs_of
from flamingo_reference.model import torch_from_numpy

if TYPE_CHECKING:
    from torch import Tensor


class TransformersParts:
    """Parts of transformers' model of a checkpoint, in fp64 and in fp32 with weights as the bundle stores them."""

    def __init__(self, source: CheckpointSource, storage: StorageType) -> None:
        """Raises ParityError if transformers' model is not made of the tensors that the bundle is made of."""
        checkpoint = source.checkpoint
        assert checkpoint.recipes is not None
        self.config, self.dtype = source.config, torch.float32
        recipes = checkpoint.recipes
        self._theirs = theirs_of(checkpoint.family.name, checkpoint.published.names())
        # Their names of the weights that are rounded, each with its gate.
        gates = {
            name: None if gate is None else next(iter(recipes[gate].sources))
            for ours, gate in rounded_names(self.config)
            for name in recipes[ours].sources
        }

        def published(name: str) -> Tensor:
            return torch_from_numpy(checkpoint.published.read(name))

        def stored(name: str) -> Tensor:
            if name not in gates:
                return published(name).to(torch.float32, copy=True)
            gate = gates[name]
            return as_stored(published(name), None if gate is None else published(gate).flatten(), storage)

        self.fp64 = StreamedModel(
            checkpoint.settings, lambda name: published(name).to(torch.float64, copy=True), torch.float64, self._theirs
        )
        self.rounded = StreamedModel(checkpoint.settings, stored, torch.float32, self._theirs)
        ours = {name for recipe in recipes.values() for name in recipe.sources}
        other = sorted(ours ^ (self.fp64.tensor_names() - set(checkpoint.ignored)))
        if other:
            raise ParityError(f"transformers' model and the bundle's are not made of the same tensors: {', '.join(other)}.")

    def stage(self, prefix: str, fp64: Callable[[Any], InFp64], rounded: Callable[[Any], Rounded]) -> tuple[InFp64, Rounded]:
        """See `validate.parts.Parts`."""
        results: list[Any] = []
        for streamed, ask in ((self.fp64, fp64), (self.rounded, rounded)):
            with torch.no_grad(), streamed.mode(), self._theirs.part(streamed, prefix) as part:
                results.append(ask(part))
        return results[0], results[1]
