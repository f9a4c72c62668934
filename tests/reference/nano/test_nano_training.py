"""The recipe in seconds: each stage learns, the frozen parts stay frozen, finished stages are not run again."""

from __future__ import annotations

import sys

import msgspec
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from flamingo_reference.config import NANO, PAPER_TOKENS  # noqa: E402
from flamingo_reference.model import Flamingo  # noqa: E402
from flamingo_reference.nano import CHECKPOINT, language, pages, pictures, train_bridge, train_vision  # noqa: E402
from flamingo_reference.nano import evaluate as nano_evaluate  # noqa: E402
from flamingo_reference.nano.evaluate import (  # noqa: E402
    BEAMS,
    CARD_END,
    CARD_START,
    GREEDY,
    TEXTS,
    Rate,
    Reader,
    Results,
    evaluate,
    markdown,
    write_card,
)
from flamingo_reference.nano.heldout import COUNTS, FEW_SHOT, heldout  # noqa: E402
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


RESULTS = Results(
    {name: {way: Rate(9, 10) for way in (GREEDY, BEAMS, TEXTS)} for name in ("images", "scene")},
    {"images": {way: Rate(3, 4) for way in (GREEDY, BEAMS, TEXTS)}},
    {"all": {"0": Rate(1, 4)}},
)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The command on a model that is not loaded, measured at once: what it was asked to measure, and a card of its own."""
    asked: list[dict[str, int]] = []

    def found(model, tokenizer, **counts):
        asked.append(counts)
        return RESULTS

    monkeypatch.setattr(Flamingo, "from_checkpoint", lambda path: f"the model of {path}")
    monkeypatch.setattr(nano_evaluate, "evaluate", found)
    monkeypatch.setattr(nano_evaluate, "MODEL_CARD", tmp_path / "MODEL_CARD.md")
    (tmp_path / "MODEL_CARD.md").write_text(f"before\n{CARD_START}\nold\n{CARD_END}\nafter\n")
    return asked


def test_the_command_prints_tables_and_writes_the_card(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--card"])
    nano_evaluate.main()
    tables = capsys.readouterr().out.rstrip("\n")
    assert "| scene | 90.0 % | 90.0 % | 90.0 % | 10 |" in tables
    assert (tmp_path / "MODEL_CARD.md").read_text() == f"before\n{CARD_START}\n{tables}\n{CARD_END}\nafter\n"
    assert measured == [{"scenes": COUNTS["scene"], "digits": COUNTS["digit"], "videos": COUNTS["video"], "few_shot": FEW_SHOT}]


def test_the_quick_command_asks_a_tenth_and_leaves_the_card(measured, monkeypatch, tmp_path, capsys):
    shown: list[tuple[object, ...]] = []
    monkeypatch.setattr(nano_evaluate, "contact_sheet", lambda model, tokenizer, path: shown.append((model, path)))
    monkeypatch.setattr(sys, "argv", ["evaluate", "--quick", "--json", "--images", str(tmp_path / "pictures")])
    nano_evaluate.main()
    assert msgspec.json.decode(capsys.readouterr().out, type=Results) == RESULTS
    assert measured[0] == {
        "scenes": COUNTS["scene"] // 10, "digits": COUNTS["digit"] // 10, "videos": COUNTS["video"] // 10, "few_shot": 6
    }  # fmt: skip
    assert shown == [(f"the model of {CHECKPOINT}", tmp_path / "pictures" / "contact_sheet.png")]
    assert "old" in (tmp_path / "MODEL_CARD.md").read_text()


def test_a_contact_sheet_shows_what_is_wrong_in_red(tokenizer, monkeypatch, tmp_path):
    class Said:
        """Right, but for the second item."""

        def __init__(self, model, tokenizer, items):
            self.items = items

        def ask(self, prompts):
            assert [prompt[0].medium for prompt in prompts] == list(range(len(self.items)))
            return [
                "a long answer that is wrong and wants two lines" if i == 1 else item.caption
                for i, item in enumerate(self.items)
            ]

    monkeypatch.setattr(nano_evaluate, "Reader", Said)
    nano_evaluate.contact_sheet(Flamingo(NANO), tokenizer, tmp_path / "new" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (4 * 172, 6 * 190, 3)  # twelve scenes, six digits and six videos, six in a row
    cells = sheet.reshape(4, 172, 6, 190, 3).transpose(0, 2, 1, 3, 4).reshape(24, 172, 190, 3)
    texts = cells[:, 138:]
    dark = texts[..., 1] < 128  # letters have soft edges
    red = dark & (texts[..., 0] == 255)
    assert [index for index in range(24) if red[index].any()] == [1]
    assert red[1, :14].any()
    assert red[1, 14:].any()
    assert all((dark[index] & (texts[index, ..., 0] < 128)).any() for index in range(24) if index != 1)
    item = heldout("scene", 12)[3]
    assert np.array_equal(cells[3][8:136:2, 8:136:2], item.frames[0])
