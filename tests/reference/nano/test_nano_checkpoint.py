"""The shipped checkpoint does what its card says, on samples small enough for every run.

The thresholds lie below the card's figures by what a sample of this size can be off (three standard errors).
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flamingo_reference.config import NANO  # noqa: E402
from flamingo_reference.model import Flamingo  # noqa: E402
from flamingo_reference.names import expected_tensors  # noqa: E402
from flamingo_reference.nano import CHECKPOINT, pages  # noqa: E402
from flamingo_reference.nano.evaluate import Reader, few_shot_rates, heldout, rate  # type: ignore[attr-defined]  # noqa: E402
from flamingo_reference.nano.towers import with_towers  # noqa: E402
from flamingo_reference.nano.train_tokenizer import load_tokenizer  # noqa: E402

MIN_SCENE_CAPTIONS, MIN_DIGIT_CAPTIONS, MIN_ANSWERS = 52, 85, 70


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return Flamingo.from_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT / "tokenizer" / "tokenizer.json")


def test_it_is_the_preset_in_full_precision_and_small(model):
    assert model.config == with_towers(NANO)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected_tensors(model.config)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    sizes = {file.name: file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()}
    assert sizes.pop("contrastive.safetensors") <= 2_000_000
    assert sum(sizes.values()) <= 10_000_000


def test_the_gates_have_opened(model):
    gates = [float(block.attention_gate.detach().abs()) for block in model.gated_blocks()]
    assert min(gates) > 1e-3


@pytest.mark.slow
def test_captions_of_held_out_images_are_right(model, tokenizer):
    for kind, count, least in (("scene", 60, MIN_SCENE_CAPTIONS), ("digit", 60, MIN_DIGIT_CAPTIONS)):
        reader = Reader(model, tokenizer, heldout(kind, count))
        said = reader.ask([[pages.Piece(index, "Output:", "")] for index in range(count)])
        assert rate(said, [item.caption for item in reader.items]).percent >= least


def test_without_its_image_a_caption_is_a_guess(model, tokenizer):
    """The same prompts about other images: if these were right too, the model would not look."""
    items = heldout("scene", 40)
    said = Reader(model, tokenizer, items).ask([[pages.Piece((index + 7) % 40, "Output:", "")] for index in range(40)])
    assert rate(said, [item.caption for item in items]).percent < 30


def test_questions_about_held_out_images_are_answered(model, tokenizer):
    reader = Reader(model, tokenizer, heldout("scene", 60))
    asked = [(index, item.questions[index % len(item.questions)]) for index, item in enumerate(reader.items)]
    said = reader.ask([[pages.Piece(index, f"Question: {question} Answer:", "")] for index, (question, _) in asked])
    assert rate(said, [answer for _, (_, answer) in asked]).percent >= MIN_ANSWERS


@pytest.mark.slow
def test_shots_tell_the_format(model, tokenizer):
    table = few_shot_rates(model, tokenizer, count=4, shots=(0, 4))["all"]
    assert table["4"].percent >= table["0"].percent + 20
