"""The decoder graph: prefill, chunks, beams as a tree, scoring, phi, distances, and its parts, against the reference in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.sources import LiveSource
from flamingo_export.weights import WeightIndex
from flamingo_reference.model import Flamingo
from flamingo_reference.model.subgraphs import Decoder, Subgraph
from tests.export.graphs.conftest import Arrays, Calls, Run, assert_as_exact, open_graph, reference


@pytest.fixture
def decoder(graph: Callable[[str], Run]) -> Run:
    return graph("decoder")


def present(outputs: Arrays) -> Arrays:
    """A call's caches as the next call's inputs."""
    return {name.replace("present", "past"): value for name, value in outputs.items() if name.startswith("present")}


def check(decoder: Run, subgraphs: dict[str, Subgraph], exact_decoder: Decoder, feeds: Arrays) -> Arrays:
    actual = decoder(feeds)
    eager = reference(subgraphs["decoder"], feeds, torch.float32)
    for name, values in reference(exact_decoder, feeds, torch.float64).items():
        assert_as_exact("decoder", values, eager[name], actual[name])
    return actual


def test_prompts_of_a_batch_with_media(
    decoder: Run, subgraphs: dict[str, Subgraph], exact_decoder: Decoder, calls: Calls
) -> None:
    """Two requests that share a row of the bank; text before the first image, adjacent images, an image last."""
    feeds = {**calls.prompt(2, 9, 16), **calls.bank, **calls.cache(2, 16)}
    feeds["media_rows"] = np.array([[4, 1, 2], [0, 4, 4]])
    feeds["phi"] = np.array([[0, 0, 1, 2, 2, 2, 2, 3, 3], [1, 1, 2, 3, 3, 3, 3, 3, 3]])
    check(decoder, subgraphs, exact_decoder, feeds)


def test_chunks_then_decoding_equal_the_whole_prompt(decoder: Run, exact_model: Flamingo, calls: Calls) -> None:
    """Against the reference without a cache; the padded last chunk ends in a scratch slot that is overwritten."""
    length, capacity, chunk = 11, 16, 4
    tokens, phi, rows = calls.tokens(1, length), np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]]), np.array([[3, 1]])
    bank = [tuple(torch.from_numpy(calls.bank[f"media_{kind}.{i}"]).double() for kind in "kv") for i in range(2)]
    with torch.no_grad():
        exact = exact_model(torch.from_numpy(tokens), bank, torch.from_numpy(rows), torch.from_numpy(phi)).numpy()
    cache, logits = calls.cache(1, capacity), []
    for start, size in ((0, 4), (4, 4), (8, 2), (10, 1)):
        padded = chunk if size == 2 else size
        feeds = calls.prompt(1, padded, capacity, start=start)
        feeds["token_ids"][:, :size] = tokens[:, start : start + size]
        feeds["phi"][:, :size] = phi[:, start : start + size]
        feeds["phi"][:, size:] = 0
        outputs = decoder({**feeds, "media_rows": rows, **calls.bank, **cache})
        cache = present(outputs)
        logits.append(outputs["logits"][:, :size])
    assert np.abs(np.concatenate(logits, axis=1) - exact).max() <= 2e-5 * np.abs(exact).max()


def test_beams_as_a_tree_equal_a_cache_reordered_by_copying(decoder: Run, calls: Calls) -> None:
    """Random parents for six steps. Told the wrong parents, the numbers differ plainly: the comparison can fail."""
    width, length, steps, capacity = 3, 5, 6, 32
    random = np.random.default_rng(3)
    prompt = {**calls.prompt(1, length, capacity), **calls.bank}
    prompt["phi"][:, 2:] = 1
    tree = present(decoder({**prompt, **calls.cache(1, capacity)}))
    copied = {name: np.repeat(value, width, axis=0) for name, value in tree.items()}
    mask = np.zeros((width, capacity), bool)
    mask[:, :length] = True
    key_positions = np.arange(capacity)[None].copy()
    worst, misled = 0.0, 0.0
    for step in range(steps):
        parents = random.integers(0, width, width)
        tokens = calls.tokens(width)
        used = length + step * width
        unsorted = mask.copy()
        mask = mask[parents]
        for which in (mask, unsorted):
            which[np.arange(width), used + np.arange(width)] = True
        key_positions[0, used : used + width] = length + step
        common = {"media_rows": np.zeros((1, 1), np.int64), "phi": np.ones((1, width), np.int64), **calls.bank}
        tree_feeds = {
            "token_ids": tokens[None],
            "positions": np.full((1, width), length + step),
            "write_index": np.array([used]),
            "key_positions": key_positions,
            "logit_positions": np.arange(width)[None],
            **common,
        }
        wrong = decoder({**tree_feeds, "mask": unsorted[None, None], **tree})["logits"][0]
        outputs = decoder({**tree_feeds, "mask": mask[None, None], **tree})
        tree = present(outputs)
        plain = calls.prompt(width, 1, capacity, start=length + step)
        plain["token_ids"] = tokens[:, None]
        plain |= {"phi": np.ones((width, 1), np.int64), "media_rows": np.zeros((width, 1), np.int64)}
        reordered = decoder({**plain, **calls.bank, **{name: value[parents] for name, value in copied.items()}})
        copied = present(reordered)
        worst = max(worst, float(np.abs(outputs["logits"][0] - reordered["logits"][:, 0]).max()))
        misled = max(misled, float(np.abs(wrong - reordered["logits"][:, 0]).max()))
    assert worst <= 1e-5
    assert misled > 1e-2


def test_distances_beyond_the_table_read_its_last_entry(
    decoder: Run, subgraphs: dict[str, Subgraph], exact_decoder: Decoder, calls: Calls
) -> None:
    """120 positions of a model that knows 96 distances, in a cache of more than one block of the table."""
    assert calls.config.language_model.max_positions == 96
    feeds = {**calls.prompt(1, 120, 150), **calls.bank, **calls.cache(1, 150)}
    check(decoder, subgraphs, exact_decoder, feeds)


def test_a_full_cache_and_a_row_beside_it_that_has_barely_begun(
    decoder: Run, subgraphs: dict[str, Subgraph], exact_decoder: Decoder, calls: Calls
) -> None:
    capacity = 24
    cache = {name: calls.normal(*value.shape) for name, value in calls.cache(2, capacity).items()}
    feeds = {**calls.prompt(2, 1, capacity, start=capacity - 1), **calls.bank, **cache}
    slots = np.arange(capacity)
    feeds["positions"] = np.array([[capacity - 1], [1]])
    feeds["write_index"] = np.array([capacity - 1, 1])
    feeds["mask"] = slots <= feeds["positions"][:, None, :, None]
    outputs = check(decoder, subgraphs, exact_decoder, feeds)
    cache["past_k.0"][1, :, 2:] = 1e4  # slots that row 1 may not see
    assert np.array_equal(decoder({**feeds, **cache})["logits"], outputs["logits"])


def test_only_the_wanted_logits(decoder: Run, calls: Calls) -> None:
    feeds = {**calls.prompt(2, 7, 8), **calls.bank, **calls.cache(2, 8)}
    every = decoder(feeds)["logits"]
    wanted = np.array([[6, 0], [3, 3]])
    some = decoder({**feeds, "logit_positions": wanted})["logits"]
    assert np.abs(some - every[np.arange(2)[:, None], wanted]).max() <= 1e-6


def test_no_medium_and_gates_at_zero_are_the_language_model(
    tiny_model: Flamingo, bundle_writer: Callable[..., Path], tmp_path: Path, calls: Calls
) -> None:
    model = Flamingo(tiny_model.config)
    state = tiny_model.state_dict() | {
        f"cross_attention.{i}.{gate}_gate": torch.zeros(()) for i in (0, 1) for gate in ("attention", "ffw")
    }
    model.load_state_dict(state)
    closed = open_graph(bundle_writer(LiveSource(model.eval()), tmp_path / "b") / "decoder.onnx")
    feeds = {**calls.prompt(1, 8, 8), **calls.bank, **calls.cache(1, 8), "phi": np.array([[0, 0, 1, 1, 1, 1, 1, 1]])}
    with torch.no_grad():
        exact = model.double().language_model(torch.from_numpy(feeds["token_ids"])).numpy()
    logits = closed(feeds)["logits"]
    assert np.abs(logits - exact).max() <= 1e-5 * np.abs(exact).max()
    for bank in calls.bank.values():
        bank *= 3.0
    assert np.array_equal(closed({**feeds, **calls.bank})["logits"], logits)


def test_what_a_medium_shows_matters_where_phi_says_so(decoder: Run, calls: Calls) -> None:
    feeds = {**calls.prompt(1, 6, 8), **calls.bank, **calls.cache(1, 8)}
    feeds |= {"phi": np.array([[0, 0, 1, 1, 2, 2]]), "media_rows": np.array([[1, 3]])}
    before = decoder(feeds)["logits"][0]
    changed = {name: np.where(np.arange(5)[:, None, None, None] == 3, -value, value) for name, value in calls.bank.items()}
    after = decoder({**feeds, **changed})["logits"][0]
    assert np.array_equal(before[:4], after[:4])
    assert np.abs(before[4:] - after[4:]).max() > 1e-2


@pytest.mark.parametrize("cuts", [(1,), (1, 2), (2,)])
def test_parts_chained_equal_the_whole(
    decoder: Run, tiny_bundle: Path, tiny_model: Flamingo, calls: Calls, cuts: tuple[int, ...]
) -> None:
    config, index = tiny_model.config, WeightIndex.read(tiny_bundle)
    feeds = {**calls.prompt(2, 5, 8), **calls.bank, **calls.cache(2, 8)}
    feeds["phi"][:, 2:] = 1
    joined: dict[str, Any] = {}
    whole, hidden = decoder(feeds), None
    bounds = [0, *cuts, config.language_model.num_layers]
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        model = build_graph(config, f"decoder.{part}", index, layers=range(start, stop))
        wanted = {value.name for value in model.graph.inputs}
        path = tiny_bundle / f"part-{start}-{stop}.onnx"  # weights are found beside it
        save_graph(model, path)
        given = {name: value for name, value in feeds.items() if name in wanted}
        outputs = open_graph(path)(given if hidden is None else given | {"hidden": hidden})
        path.unlink()
        hidden = outputs.pop("hidden_out", None)
        joined |= outputs
    assert set(joined) == set(whole)
    for name, values in whole.items():
        assert np.abs(joined[name] - values).max() <= 1e-5, name


def test_the_cache_is_written_in_place(tiny_bundle: Path, calls: Calls) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(tiny_bundle / "decoder.onnx", providers=["CPUExecutionProvider"])
    cache = calls.cache(1, 8)
    feeds = {**calls.prompt(1, 2, 8, start=3), **calls.bank}
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value))
    for name, value in cache.items():
        shared = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        binding.bind_ortvalue_input(name, shared)
        binding.bind_ortvalue_output(name.replace("past", "present"), shared)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    for value in cache.values():
        written = np.abs(value).sum(axis=(0, 1, 3)) > 0
        assert written.tolist() == [slot in (3, 4) for slot in range(8)]
