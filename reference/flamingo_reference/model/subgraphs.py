"""The model cut as the exported graphs are: one module per subgraph, with the graph's inputs and outputs by name.

    vision_encoder   pixels (aspect_ratio_ids, of tiles) -> features, and pooled where there is a contrastive encoder
    resampler        features, time_weights -> latents
    media_kv         latents -> media_k.i, media_v.i for each gated layer i
    decoder          token_ids (or hidden), positions, media_rows, phi, first_media (where tokens see ranges of media),
                     write_index, mask, key_positions, logit_positions, media_k.i, media_v.i, past_k.j, past_v.j
                     -> logits (or hidden_out), present_k.j, present_v.j
    image_tower      pooled -> image_embedding                  (of a contrastive encoder)
    text_tower       token_ids, lengths -> text_embedding       (of one that has a text tower)

A subgraph's parameters bear the checkpoint's names, so a part of a model is read without the rest of it (`load_subgraph`); or it shares
the modules of a whole model (`subgraphs_of`). Shape suffixes: B requests, S positions in this call, C cache capacity, K positions whose
logits are wanted, N rows of the media bank, M media of a request, R latents, T frames, P patches, E feature width, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import ContrastiveConfig
from flamingo_reference.model import Flamingo, torch_from_numpy
from flamingo_reference.model.contrastive import Contrastive, features_and_pooled
from flamingo_reference.model.cross_attention import GatedCrossAttention, project_media
from flamingo_reference.model.decoder import LanguageModel, LanguageModelLayer
from flamingo_reference.model.resampler import Resampler as ResamplerModule
from flamingo_reference.model.resampler import make_resampler
from flamingo_reference.model.vision import make_vision_encoder
from flamingo_reference.model.vision_tiled import TiledViT

Tensors = Mapping[str, Tensor]
SUBGRAPHS = ("vision_encoder", "resampler", "media_kv", "decoder")


class Subgraph(nn.Module):
    """Named tensors in, named tensors out."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def check(self, feeds: Tensors) -> None:
        """Raises ValueError naming the inputs that are missing and those that are unknown."""
        missing = [name for name in self.inputs if name not in feeds]
        unknown = [name for name in feeds if name not in self.inputs]
        if missing or unknown:
            raise ValueError(f"{type(self).__name__}: missing inputs {missing}, unknown inputs {unknown}")


class VisionEncoder(Subgraph):
    """pixels [F, 3, I, I] -> features [F, P, E], and pooled [F, Ep] where there is a contrastive encoder; of tiles: pixels
    [F, Tmax, 3, I, I], aspect_ratio_ids [F] -> [F, Tmax, P, E]."""

    def __init__(
        self, encoder: nn.Module, contrastive: ContrastiveConfig | None = None, readout: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.vision_encoder = encoder
        self.inputs = ("pixels", "aspect_ratio_ids") if isinstance(encoder, TiledViT) else ("pixels",)
        self.config = contrastive
        self.outputs = ("features",) if contrastive is None else ("features", "pooled")
        self.contrastive = nn.Module()
        if readout is not None:
            self.contrastive.readout = readout

    def forward(self, feeds: Tensors) -> dict[str, Tensor]:
        self.check(feeds)
        if self.config is None:
            return {"features": self.vision_encoder(*(feeds[name] for name in self.inputs))}
        readout = getattr(self.contrastive, "readout", None)
        features, pooled = features_and_pooled(self.vision_encoder, feeds["pixels"], self.config, readout)
        return {"features": features, "pooled": pooled}


class Image(Subgraph):
    """pooled [F, Ep] -> image_embedding [F, J]."""

    inputs, outputs = ("pooled",), ("image_embedding",)

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.contrastive = nn.Module()
        self.contrastive.image = tower

    def forward(self, feeds: Tensors) -> dict[str, Tensor]:
        self.check(feeds)
        return {"image_embedding": self.contrastive.get_submodule("image")(feeds["pooled"])}


class Text(Subgraph):
    """token_ids [B, S], lengths [B] -> text_embedding [B, J]."""

    inputs, outputs = ("token_ids", "lengths"), ("text_embedding",)

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.contrastive = nn.Module()
        self.contrastive.text = tower

    def forward(self, feeds: Tensors) -> dict[str, Tensor]:
        self.check(feeds)
        return {"text_embedding": self.contrastive.get_submodule("text")(feeds["token_ids"], feeds["lengths"])}


class Resampler(Subgraph):
    """features [N, T, P, E], time_weights [T, 8] (where there are time embeddings) -> latents [N, R, W]."""

    outputs = ("latents",)

    def __init__(self, resampler: ResamplerModule) -> None:
        super().__init__()
        self.resampler = resampler
        self.inputs = ("features",) if resampler.time_embeddings is None else ("features", "time_weights")

    def forward(self, feeds: Tensors) -> dict[str, Tensor]:
        self.check(feeds)
        return {"latents": self.resampler(feeds["features"], feeds.get("time_weights"))}


class _Projections(nn.Module):
    """What media go through of a gated block: two matrices, and the norm of keys where there is one."""

    def __init__(self, block: GatedCrossAttention) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.k_norm = block.k_proj, block.v_proj, block.k_norm


class MediaKV(Subgraph):
    """latents [N, R, W] -> media_k.i, media_v.i [N, Hx, R, Dx] of every gated layer."""

    inputs = ("latents",)

    def __init__(self, config: ModelConfig, blocks: Iterable[GatedCrossAttention]) -> None:
        super().__init__()
        self.heads = (config.cross_attention.kv_heads, config.cross_attention.head_size)
        self.cross_attention = nn.ModuleList(_Projections(block) for block in blocks)
        self.outputs = tuple(f"media_{kind}.{i}" for i in range(len(config.gated_layers)) for kind in "kv")

    def forward(self, feeds: Tensors) -> dict[str, Tensor]:
        self.check(feeds)
        found: dict[str, Tensor] = {}
        for i, block in enumerate(self.cross_attention):
            assert isinstance(block, _Projections)
            found[f"media_k.{i}"] = project_media(block.k_proj, feeds["latents"], self.heads, block.k_norm)
            found[f"media_v.{i}"] = project_media(block.v_proj, feeds["latents"], self.heads)
        return found


class Decoder(Subgraph):
    """The decoder, or the part of it with these LM layers and the gated blocks before them.

    token_ids [B, S] (hidden [B, S, W] unless the part is the first), positions [B, S], media_rows [B, M], phi [B, S],
    first_media [B, S] (only where tokens see ranges of media),
    write_index [B], mask bool [B, 1, S, C], key_positions [B, C] (of the slots as this call leaves them; only where attention depends
    on distances), logit_positions [B, K] (last part only), media_k.i / media_v.i [N, Hx, R, Dx], past_k.j / past_v.j [B, G, C, D] with
    G heads of keys and values -> logits [B, K, V] (hidden_out [B, S, W] unless the part is the last), present_k.j / present_v.j.

    in_place: the caches given are written to and returned, as the graphs do; else they are copied.
    Raises ValueError for missing or unknown inputs, a call that does not fit the cache, and phi beyond the media.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        *,
        layer_modules: Iterable[LanguageModelLayer],
        gated_modules: Iterable[GatedCrossAttention],
        ends: LanguageModel,
        in_place: bool = False,
    ) -> None:
        """layer_modules: one for each of `layers`. gated_modules: one for each gated layer among them. ends: embedding and norm."""
        super().__init__()
        self.layers, self.num_layers, self.in_place = layers, config.language_model.num_layers, in_place
        self.first, self.last = layers.start == 0, layers.stop == self.num_layers
        self.gated = {layer: i for i, layer in enumerate(config.gated_layers) if layer in layers}
        self.cross_attention = nn.ModuleDict({str(i): m for i, m in zip(self.gated.values(), gated_modules, strict=True)})
        self.language_model = nn.Module()
        if self.first or (self.last and ends.head is None):
            self.language_model.embedding = ends.embedding
        self.language_model.layers = nn.ModuleDict({str(j): m for j, m in zip(layers, layer_modules, strict=True)})
        if self.last:
            self.language_model.norm = ends.norm
            if ends.head is not None:
                self.language_model.head = ends.head
        self.output = "embedding.weight" if ends.head is None else "head.weight"
        self.tables: dict[int, Tensor] = {}
        caches = [f"past_{kind}.{j}" for j in layers for kind in "kv"]
        banks = [f"media_{kind}.{i}" for i in self.gated.values() for kind in "kv"]
        self.inputs = (
            "token_ids" if self.first else "hidden",
            "positions",
            *(("media_rows", "phi") if self.gated else ()),
            *(("first_media",) if self.gated and config.sees_groups else ()),
            "write_index",
            "mask",
            *(("key_positions",) if config.language_model.uses_distances else ()),
            *(("logit_positions",) if self.last else ()),
            *banks,
            *caches,
        )
        self.outputs = ("logits" if self.last else "hidden_out", *(name.replace("past_", "present_") for name in caches))

    def precompute(self, num_distances: int) -> None:
        """Projects the distances 0 .. num_distances - 1 of each layer once, for weights that no longer change. Relative positions only.

        Afterwards greater distances read the last of them. Without it every call projects as many distances as it meets.
        """
        with torch.no_grad():
            self.tables = {j: self._layer(j).distance_table(num_distances) for j in self.layers}

    def forward(self, feeds: Tensors) -> dict[str, Tensor]:
        self.check(feeds)
        num_positions, capacity = feeds["mask"].shape[-2:]
        if int(feeds["write_index"].max()) + num_positions > capacity:
            raise ValueError(
                f"{num_positions} positions from slot {int(feeds['write_index'].max())} on do not fit a cache of {capacity}"
            )
        embed = self.language_model.get_submodule("embedding") if self.first else None
        hidden = feeds["hidden"] if embed is None else embed(feeds["token_ids"])
        distance_BSC = None
        if "key_positions" in self.inputs:
            distance_BSC = feeds["positions"][:, :, None] - feeds["key_positions"][:, None, :]
        caches: dict[str, Tensor] = {}
        for j in self.layers:
            if j in self.gated:
                i = self.gated[j]
                block = self.cross_attention[str(i)]
                banks = feeds[f"media_k.{i}"], feeds[f"media_v.{i}"]
                hidden = block(hidden, *banks, feeds["media_rows"], feeds["phi"], feeds.get("first_media"))
            hidden, caches[f"present_k.{j}"], caches[f"present_v.{j}"] = self._layer(j).forward_cached(
                hidden,
                past_k=feeds[f"past_k.{j}"],
                past_v=feeds[f"past_v.{j}"],
                write_index_B=feeds["write_index"],
                positions_BS=feeds["positions"],
                distance_BSC=distance_BSC,
                mask_B1SC=feeds["mask"],
                table_XHD=self.tables.get(j),
                in_place=self.in_place,
            )
        if not self.last:
            return {"hidden_out": hidden, **caches}
        wanted_BKW = hidden.gather(1, feeds["logit_positions"][:, :, None].expand(-1, -1, hidden.shape[-1]))
        normed = self.language_model.get_submodule("norm")(wanted_BKW)
        logits = nn.functional.linear(normed, self.language_model.get_parameter(self.output))
        return {"logits": logits, **caches}

    def _layer(self, j: int) -> LanguageModelLayer:
        layer = self.language_model.get_submodule(f"layers.{j}")
        assert isinstance(layer, LanguageModelLayer)
        return layer


def subgraphs_of(model: Flamingo) -> dict[str, Subgraph]:
    """The subgraphs of a model, sharing its modules: the four, and the towers of its contrastive encoder."""
    contrastive = model.contrastive
    found: dict[str, Subgraph] = {
        "vision_encoder": VisionEncoder(
            model.vision_encoder, model.config.contrastive, None if contrastive is None else contrastive.readout
        ),
        "resampler": Resampler(model.resampler),
        "media_kv": MediaKV(model.config, model.gated_blocks()),
        "decoder": decoder_of(model),
    }
    return found | (_towers(contrastive) if contrastive is not None else {})


def _towers(contrastive: Contrastive) -> dict[str, Subgraph]:
    found: dict[str, Subgraph] = {"image_tower": Image(contrastive.image)}
    return found if contrastive.text is None else found | {"text_tower": Text(contrastive.text)}


def decoder_of(model: Flamingo, layers: range | None = None, *, in_place: bool = False) -> Decoder:
    """The decoder of a model, or a part of it, sharing its modules."""
    config = model.config
    layers = range(config.language_model.num_layers) if layers is None else layers
    blocks = model.gated_blocks()
    modules = [model.language_model.layers[j] for j in layers]
    return Decoder(
        config,
        layers,
        layer_modules=(module for module in modules if isinstance(module, LanguageModelLayer)),
        gated_modules=[block for layer, block in zip(config.gated_layers, blocks, strict=True) if layer in layers],
        ends=model.language_model,
        in_place=in_place,
    )


def empty_subgraph(config: ModelConfig, name: str, *, layers: range | None = None) -> Subgraph:
    """A subgraph made from only the configuration, holding exactly the parameters it uses. `layers`: a part of the decoder."""
    contrastive = Contrastive(config) if config.contrastive is not None else None
    if name == "vision_encoder":
        readout = None if contrastive is None else contrastive.readout
        return VisionEncoder(make_vision_encoder(config.vision), config.contrastive, readout)
    if contrastive is not None and name in (towers := _towers(contrastive)):
        return towers[name]
    if name == "resampler":
        return Resampler(make_resampler(config))
    if name == "media_kv":
        return MediaKV(config, [GatedCrossAttention(config) for _ in config.gated_layers])
    if name == "decoder":
        layers = range(config.language_model.num_layers) if layers is None else layers
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= config.language_model.num_layers:
            raise ValueError(f"{layers} is not a run of the {config.language_model.num_layers} LM layers")
        blocks = [GatedCrossAttention(config) for layer in config.gated_layers if layer in layers]
        for block in blocks:
            del block.k_proj, block.v_proj, block.k_norm  # media_kv's
        return Decoder(
            config,
            layers,
            layer_modules=[LanguageModelLayer(config.language_model) for _ in layers],
            gated_modules=blocks,
            ends=LanguageModel(msgspec.structs.replace(config.language_model, num_layers=0)),
        )
    raise ValueError(f"{name!r} is not a subgraph; they are {', '.join(SUBGRAPHS)}")


def load_subgraph(
    config: ModelConfig,
    name: str,
    read: Callable[[str], npt.NDArray[Any]],
    *,
    layers: range | None = None,
    dtype: torch.dtype | None = None,
) -> Subgraph:
    """A subgraph with its weights, each got from `read` by its checkpoint name; nothing else of the model is read.

    dtype: what the weights are converted to, one by one; None keeps them as they are stored.
    """
    with torch.device("meta"):
        module = empty_subgraph(config, name, layers=layers)
    state = {}
    for tensor_name in module.state_dict():
        tensor = torch_from_numpy(read(tensor_name))
        state[tensor_name] = tensor if dtype is None else tensor.to(dtype)
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False)
