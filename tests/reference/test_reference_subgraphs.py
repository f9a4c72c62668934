"""Subgraphs: cached, chunked and tree-masked calls, parts of the decoder, parts read alone; all against the whole uncached model."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import TINY, tiny_model
from torch import Tensor

from flamingo_reference.config import SIZES
from flamingo_reference.model import Flamingo, numpy_from_torch, subgraphs
from flamingo_reference.model.subgraphs import Decoder, Subgraph, decoder_of, empty_subgraph, load_subgraph, subgraphs_of
from flamingo_reference.names import expected_tensors
from flamingo_reference.phi import phi_from_tokens

Bank = list[tuple[Tensor, Tensor]]
TIGHT: Any = {"rtol": 1e-10, "atol": 1e-12}
LM = TINY.language_model
TEXT = [1, 7, 3, 8, 9, 3, 3, 10, 11, 12, 13, 14, 15, 16]  # three media, the last two adjacent
ROWS = [4, 0, 4]


def whole(model: Flamingo, bank: Bank, tokens: list[int], rows: list[int]) -> Tensor:
    """Logits [S, V] of the uncached model."""
    phi = torch.from_numpy(phi_from_tokens(np.array([tokens]), TINY.tokens.image))
    return model(torch.tensor([tokens]), bank, torch.tensor([rows]), phi)[0]


class Cache:
    """Feeds a decoder (or its parts, one after the other) call by call."""

    def __init__(
        self, parts: list[Subgraph], bank: Bank, batch: int, capacity: int, dtype: torch.dtype = torch.float64
    ) -> None:
        self.parts, self.bank = parts, bank
        shape = (batch, LM.num_heads, capacity, LM.head_size)
        self.held = {f"past_{kind}.{j}": torch.zeros(shape, dtype=dtype) for j in range(LM.num_layers) for kind in "kv"}
        self.key_positions = torch.zeros(batch, capacity, dtype=torch.int64)
        self.capacity = capacity

    def call(
        self,
        tokens: list[list[int]],
        positions: list[list[int]],
        phi: list[list[int]],
        rows: list[list[int]],
        write: list[int],
        sees: list[list[list[int]]],
    ) -> Tensor:
        """Logits [B, S, V]. sees[b][s]: slots that a position may see besides its own."""
        batch, width = len(tokens), len(tokens[0])
        mask = torch.zeros(batch, 1, width, self.capacity, dtype=torch.bool)
        for b in range(batch):
            for s in range(width):
                mask[b, 0, s, [*sees[b][s], write[b] + s]] = True
                self.key_positions[b, write[b] + s] = positions[b][s]
        common: dict[str, Any] = {
            "token_ids": torch.tensor(tokens),
            "positions": torch.tensor(positions),
            "media_rows": torch.tensor(rows),
            "phi": torch.tensor(phi),
            "write_index": torch.tensor(write),
            "mask": mask,
            "key_positions": self.key_positions,
            "logit_positions": torch.arange(width).expand(batch, -1),
        }
        common |= {f"media_k.{i}": k for i, (k, _) in enumerate(self.bank)}
        common |= {f"media_v.{i}": v for i, (_, v) in enumerate(self.bank)}
        for part in self.parts:
            given = common | self.held
            found = part({name: given[name] for name in part.inputs})
            assert tuple(found) == part.outputs
            self.held |= {name.replace("present", "past"): found[name] for name in found if name.startswith("present")}
            common["hidden"] = found.get("hidden_out")
        return found["logits"]


def causal(start: int, width: int) -> list[list[int]]:
    return [list(range(start + s)) for s in range(width)]


def phi_of(tokens: list[int]) -> list[int]:
    return phi_from_tokens(np.array([tokens]), TINY.tokens.image)[0].tolist()


PARTS = {"whole": [range(5)], "two": [range(2), range(2, 5)], "cut at gated layers": [range(1), range(1, 4), range(4, 5)]}


@pytest.mark.parametrize("chunk", [1, 4, 5, 14])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("in_place", [False, True])
def test_chunks_equal_the_uncached_model(tiny: Flamingo, bank: Bank, chunk: int, parts: list[range], in_place: bool) -> None:
    """14 positions: more than the table has distances, so the last of them is met too."""
    cache = Cache([decoder_of(tiny, layers, in_place=in_place) for layers in parts], bank, 1, len(TEXT) + 2)
    phi, found = phi_of(TEXT), []
    for start in range(0, len(TEXT), chunk):
        stop = min(start + chunk, len(TEXT))
        found.append(
            cache.call(
                [TEXT[start:stop]],
                [list(range(start, stop))],
                [phi[start:stop]],
                [ROWS],
                [start],
                [causal(start, stop - start)],
            )[0]
        )
    torch.testing.assert_close(torch.cat(found), whole(tiny, bank, TEXT, ROWS), **TIGHT)


def test_tables_worked_out_before_change_nothing(tiny: Flamingo, bank: Bank) -> None:
    decoder = decoder_of(tiny)
    decoder.precompute(len(TEXT))
    found = Cache([decoder], bank, 1, 20).call([TEXT], [list(range(14))], [phi_of(TEXT)], [ROWS], [0], [causal(0, 14)])
    torch.testing.assert_close(found[0], whole(tiny, bank, TEXT, ROWS), **TIGHT)


def test_beams_as_a_tree(tiny: Flamingo, bank: Bank) -> None:
    """Prompt once, then three beams for three steps, each slot seen by its descendants only; decoding knows one medium."""
    prompt = TEXT[:8]
    cache = Cache([decoder_of(tiny)], bank, 1, 8 + 9)
    cache.call([prompt], [list(range(8))], [phi_of(prompt)], [ROWS], [0], [causal(0, 8)])
    paths: list[list[tuple[int, int]]] = [[], [], []]  # (slot, token) of each beam's generated tokens
    for step, (parents, tokens) in enumerate([([0, 0, 0], [20, 21, 22]), ([1, 1, 0], [23, 24, 25]), ([2, 0, 2], [26, 27, 28])]):
        write = 8 + 3 * step
        sees = [[*range(8), *(slot for slot, _ in paths[parent])] for parent in parents]
        found = cache.call([tokens], [[8 + step] * 3], [[1, 1, 1]], [[ROWS[2]]], [write], [sees])
        paths = [[*paths[parent], (write + beam, tokens[beam])] for beam, parent in enumerate(parents)]
        for beam, path in enumerate(paths):
            wanted = whole(tiny, bank, prompt + [token for _, token in path], ROWS)[-1]
            torch.testing.assert_close(found[0, beam], wanted, **TIGHT)


def test_rows_of_different_lengths(tiny: Flamingo, bank: Bank) -> None:
    """A padded position sees its own slot only, and its slot is written over by the next call."""
    long, short = [1, 3, 7, 8, 9], [1, 3]
    cache = Cache([decoder_of(tiny)], bank, 2, 12)
    sees = [causal(0, 5), [*causal(0, 2), [], [], []]]
    positions = [list(range(5)), [0, 1, 0, 0, 0]]
    phi = [phi_of(long), [*phi_of(short), 0, 0, 0]]
    first = cache.call([long, [*short, 0, 0, 0]], positions, phi, [[2], [3]], [0, 0], sees)
    torch.testing.assert_close(first[0], whole(tiny, bank, long, [2]), **TIGHT)
    torch.testing.assert_close(first[1, :2], whole(tiny, bank, short, [3]), **TIGHT)
    then = cache.call([[20], [21]], [[5], [2]], [[1], [1]], [[2], [3]], [5, 2], [causal(5, 1), causal(2, 1)])
    torch.testing.assert_close(then[0, 0], whole(tiny, bank, [*long, 20], [2])[-1], **TIGHT)
    torch.testing.assert_close(then[1, 0], whole(tiny, bank, [*short, 21], [3])[-1], **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    latents = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 7, 20))).to(dtype)
    bank = model.media_kv(latents)
    cache = Cache([decoder_of(model)], bank, 1, 16, dtype)
    found = cache.call([TEXT], [list(range(14))], [phi_of(TEXT)], [ROWS], [0], [causal(0, 14)])[0]
    reference = tiny_model()
    wanted = whole(reference, reference.media_kv(latents.double()), TEXT, ROWS)
    assert found.dtype == dtype
    error = ((found.double() - wanted).abs().max() / wanted.square().mean().sqrt()).item()
    # Measured 2 to 30 roundings of 1; a wrong medium or distance is an error of order 1.
    assert error < 100 * torch.finfo(dtype).eps / 2


def test_a_row_that_sees_nothing_is_zero_and_not_nan(tiny: Flamingo) -> None:
    layer: Any = tiny.language_model.layers[0]
    q = torch.randn(1, LM.num_heads, 2, LM.head_size, dtype=torch.float64)
    mask = torch.tensor([[True, True], [False, False]])[None, None]
    found = layer.attend(q, q, q, torch.zeros(1, 1, 2, 2, dtype=torch.float64), mask)
    assert torch.equal(found[0, 1], torch.zeros(LM.width, dtype=torch.float64))
    assert found[0, 0].abs().min() > 0


def test_media_subgraphs_equal_the_model(tiny: Flamingo) -> None:
    parts = subgraphs_of(tiny)
    assert tuple(parts) == subgraphs.SUBGRAPHS
    pixels = torch.randn(3, 2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features = parts["vision_encoder"]({"pixels": pixels.flatten(0, 1)})["features"]
    weights = torch.eye(2, 8, dtype=torch.float64)
    latents = parts["resampler"]({"features": features.unflatten(0, (3, 2)), "time_weights": weights})["latents"]
    torch.testing.assert_close(latents, tiny.latents(pixels), **TIGHT)
    found = parts["media_kv"]({"latents": latents})
    for i, (k, v) in enumerate(tiny.media_kv(latents)):
        assert torch.equal(found[f"media_k.{i}"], k)
        assert torch.equal(found[f"media_v.{i}"], v)
    assert len(found) == 6


def test_a_part_reads_its_own_weights_only(tiny: Flamingo, bank: Bank) -> None:
    state = {name: numpy_from_torch(tensor) for name, tensor in tiny.state_dict().items()}
    used: dict[str, set[str]] = {}

    def load(name: str, layers: range | None = None) -> Subgraph:
        seen = used.setdefault(f"{name} {layers}", set())

        def read(tensor: str) -> npt.NDArray[Any]:
            seen.add(tensor)
            return state[tensor]

        return load_subgraph(TINY, name, read, layers=layers)

    parts = [load("decoder", layers) for layers in (range(2), range(2, 3), range(3, 5))]
    found = Cache(parts, bank, 1, 16).call([TEXT], [list(range(14))], [phi_of(TEXT)], [ROWS], [0], [causal(0, 14)])
    torch.testing.assert_close(found[0], whole(tiny, bank, TEXT, ROWS), **TIGHT)
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in used["decoder range(2, 3)"]} == {
        "cross_attention.1",
        "language_model.layers",
    }
    assert all(".layers.2." in name for name in used["decoder range(2, 3)"] if name.startswith("language_model"))
    assert used["decoder range(0, 2)"] & used["decoder range(3, 5)"] == {"language_model.embedding.weight"}
    for name in ("vision_encoder", "resampler", "media_kv"):
        load(name)
    assert set().union(*used.values()) == set(expected_tensors(TINY))
    assert load("decoder").state_dict().keys() == set().union(*(used[key] for key in used if key.startswith("decoder range")))


def test_parts_of_9b_fit_small_machines() -> None:
    """The largest piece to be loaded at once, in fp32, with one LM layer a part."""
    config = SIZES["9b"]
    shapes = expected_tensors(config)
    with torch.device("meta"):
        modules = [empty_subgraph(config, "decoder", layers=range(j, j + 1)) for j in (0, 1, 4, 39)]
        modules += [empty_subgraph(config, name) for name in ("vision_encoder", "resampler", "media_kv")]
    for module in modules:
        assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}.items() <= shapes.items()
    assert max(sum(p.numel() for p in module.parameters()) for module in modules) * 4 < 2.1 * 2**30


def test_contract_violations_are_named(tiny: Flamingo, bank: Bank) -> None:
    decoder = decoder_of(tiny, range(2, 4))
    with pytest.raises(ValueError, match=r"missing inputs \['hidden', .*'past_v.3'\], unknown inputs \['token_ids'\]"):
        decoder({"token_ids": torch.zeros(1, 1)})
    cache = Cache([decoder_of(tiny)], bank, 1, 4)
    with pytest.raises(ValueError, match="3 positions from slot 2 on do not fit a cache of 4"):
        cache.parts[0](
            {name: torch.tensor([2]) if name == "write_index" else torch.zeros(1, 1, 3, 4) for name in cache.parts[0].inputs}
        )
    with pytest.raises(ValueError, match="phi 2 is beyond the request's 1 media"):
        cache.call([[1]], [[0]], [[2]], [[0]], [0], [[[]]])
    with pytest.raises(ValueError, match="is not a run of the 5 LM layers"):
        empty_subgraph(TINY, "decoder", layers=range(3, 6))
    with pytest.raises(ValueError, match="'encoder' is not a subgraph; they are vision_encoder, resampler, media_kv, decoder"):
        empty_subgraph(TINY, "encoder")


def test_names_are_those_of_the_graphs() -> None:
    """flamingo_reference knows nothing of flamingo_export, so this is where they are compared."""
    specs = pytest.importorskip("flamingo_export.specs")
    for config in (TINY, msgspec.structs.replace(TINY, name="other"), SIZES["nano"]):
        with torch.device("meta"):
            model = Flamingo(config)
        parts: dict[str, Subgraph] = subgraphs_of(model)
        wanted = dict(specs.subgraph_specs(config))
        for layers in (range(2), range(1, 2), range(2, 5), range(4, config.language_model.num_layers)):
            wanted[str(layers)] = specs.decoder_spec(config, layers, name="part")
            parts[str(layers)] = Decoder(
                config,
                layers,
                layer_modules=[cast("Any", model.language_model.layers[j]) for j in layers],
                gated_modules=[
                    block for layer, block in zip(config.gated_layers, model.gated_blocks(), strict=True) if layer in layers
                ],
                ends=model.language_model,
            )
        for name, spec in wanted.items():
            assert parts[name].inputs == tuple(tensor.name for tensor in spec.inputs)
            assert parts[name].outputs == tuple(tensor.name for tensor in spec.outputs)
