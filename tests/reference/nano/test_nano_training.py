"""The recipe in seconds: each stage learns, the frozen parts stay frozen, finished stages are not run again."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from flamingo_reference.config import NANO, PAPER_TOKENS  # noqa: E402
from flamingo_reference.model import Flamingo  # noqa: E402
from flamingo_reference.nano import language, pages, pictures, train_bridge, train_vision  # noqa: E402
from flamingo_reference.nano.evaluate import (  # noqa: E402
    CARD_END,
    CARD_START,
    Rate,
    Reader,
    Results,
    evaluate,
    markdown,
    write_card,
)
from flamingo_reference.nano.heldout import heldout  # noqa: E402
from flamingo_reference.nano.pool import Pool  # noqa: E402
from flamingo_reference.nano.train import Run  # noqa: E402
from flamingo_reference.nano.train_tokenizer import train_tokenizer  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(NANO.language_model.vocab_size, num_items=400)


@pytest.fixture(scope="module")
def pool():
    return Pool(scenes=30, digits=10, videos=10)


@pytest.mark.slow
def test_contrastive_steps_lower_the_loss(tokenizer):
    lines: list[str] = []
    train_vision.train_vision(NANO, tokenizer, steps=21, batch=30, seed=0, log=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if " images " in line]
    assert losses[-1] < losses[0] - 0.3
    assert any(" clips " in line for line in lines)


def test_no_held_out_scene_or_motion_is_trained_on():
    rng = np.random.default_rng(3)
    images, clips = train_vision.image_batch(rng, 120), train_vision.clip_batch(rng, 40)
    scenes = [sorted(item.description.split(", ")) for item in images if item.kind == "scene"]
    assert len(images) == 120
    assert len(scenes) > 90
    assert not any(pictures.is_test(scene) for scene in scenes)
    assert {len(item.frames) for item in clips} == {len(clips[0].frames)}
    assert 40 * 4 * 0.7 < len(clips) < 160  # one motion in eight is held out


@pytest.mark.slow
def test_bridge_learns_and_leaves_the_rest_alone(tokenizer, pool):
    torch.manual_seed(0)
    model = Flamingo(NANO)
    features = train_bridge.Features(model, pool)
    model.requires_grad_(False)
    model.resampler.requires_grad_(True)
    model.cross_attention.requires_grad_(True)
    train_bridge.initialise(model)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(("vision", "language"))}
    rng = np.random.default_rng(0)
    documents = [pages.encode(train_bridge.page(rng, pool), tokenizer, PAPER_TOKENS) for _ in range(6)]
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = train_bridge.document_loss(model, features, documents)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.state_dict().items() if name in frozen)


def test_every_data_set_makes_a_batch(tokenizer, pool):
    rng = np.random.default_rng(1)
    frames_of = {index: len(item.frames) for index, item in enumerate(pool.items)}
    assert train_bridge.WEIGHTS == {"pages": 1.0, "scene pairs": 0.2, "digit pairs": 0.2, "videos": 0.03}
    for name in train_bridge.WEIGHTS:
        for pieces in train_bridge._batch(name, rng, pool, frames_of):
            encoded = pages.encode(pieces, tokenizer, PAPER_TOKENS)
            assert encoded.token_ids[0] == PAPER_TOKENS.bos
            assert 1 <= len(encoded.media) <= pages.MAX_IMAGES
            assert len({frames_of[medium] for medium in encoded.media}) == 1


def test_text_documents_are_long_enough_for_32_shots(pool):
    rng = np.random.default_rng(2)
    lengths = [len(language.text_document(rng, pool, length=384)) for _ in range(20)]
    assert max(lengths) >= 32


def test_greedy_in_batches_is_greedy_one_by_one_and_one_beam(tokenizer, pool):
    torch.manual_seed(3)
    model = Flamingo(NANO)
    for block in model.gated_blocks():
        assert block.attention_gate is not None
        nn.init.constant_(block.attention_gate, 0.7)
    reader = Reader(model, tokenizer, pool.items[:6])
    prompts = [
        [pages.Piece(0, "Output:", "")],
        [pages.Piece(1, "Output:", " red"), pages.Piece(2, "Question: What? Answer:", "")],
    ]
    together = reader.ask(prompts)
    assert together == [reader.ask([prompt])[0] for prompt in prompts]
    assert together == [reader.search(prompt, beams=1) for prompt in prompts]


def test_a_finished_stage_is_loaded_and_not_run_again(tmp_path):
    run = Run(tmp_path)
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    run.stage("part", first, lambda: nn.Linear(2, 2))
    run.stage("part", second, lambda: pytest.fail("trained again"))
    assert torch.equal(first.weight, second.weight)
    assert "part: " in (tmp_path / "train.log").read_text()


def test_half_of_the_held_out_scenes_have_several_objects():
    counts = [item.num_objects for item in heldout("scene", 40)]
    assert sum(count > 1 for count in counts) == 20


@pytest.mark.slow
def test_evaluation_makes_all_tables(tokenizer, monkeypatch):
    torch.manual_seed(4)
    monkeypatch.setattr("flamingo_reference.nano.evaluate.few_shot_rates", lambda *_, **__: {"all": {"0": Rate(1, 4)}})
    results = evaluate(Flamingo(NANO), tokenizer, scenes=4, digits=2, videos=2)
    assert results.captions["images"]["3 beams"].total == 6
    text = markdown(results)
    assert "| images |" in text
    assert "| all | 25 % |" in text


def test_the_card_keeps_its_text_around_the_tables(tmp_path):
    card = tmp_path / "MODEL_CARD.md"
    card.write_text(f"before\n{CARD_START}\nold\n{CARD_END}\nafter\n")
    write_card(card, "new")
    assert card.read_text() == f"before\n{CARD_START}\nnew\n{CARD_END}\nafter\n"
    card.write_text("no markers")
    with pytest.raises(ValueError, match="numbers"):
        write_card(card, "new")


def test_results_are_plain_data():
    results = Results({"images": {"greedy": Rate(9, 10)}}, {}, {})
    assert results.captions["images"]["greedy"].percent == 90
