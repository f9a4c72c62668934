"""The contrastive encoder in use: embeddings equal the reference's, labels, searching an index by text and by image, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from kinds import CLIP, KEPT, READ
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from variations import MPT, drawn_model

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.cli import main
from flamingo_export.errors import BundleError, CheckpointError, EvaluationError, InputError, PromptError
from flamingo_export.evaluation.index.encoder import EMBEDDINGS, MEAN_FEATURES
from flamingo_export.evaluation.index.exact_search import nearest
from flamingo_export.evaluation.index.looking import found_by_image, found_by_text
from flamingo_export.evaluation.index.store import Index, IndexedItem, build_index
from flamingo_export.runtime.contrastive import ContrastiveEncoder
from flamingo_export.runtime.media import load_medium
from flamingo_export.runtime.videos import Video
from flamingo_export.sources import CheckpointSource
from flamingo_export.sources.origin import find_origin
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.model.contrastive import features_and_pooled

WORDS = [f"w{i}" for i in range(86)]
BEGIN, END = 88, 89


def text_tokenizer(size: int = 90) -> Tokenizer:
    """Words w0 to w85, two that begin and end every text, as CLIP's tokenizer puts them there."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, "a", "of", "<s>", "</s>"])}
    vocabulary |= {f"more{index}": index for index in range(len(vocabulary), size)}
    tokenizer = Tokenizer(models.WordLevel({word: index for word, index in vocabulary.items() if index < size}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    tokenizer.enable_truncation(4)  # as published files have it; a bundle cuts nothing off
    return tokenizer


def saved(config: ModelConfig, folder: Path, tokenizer: Tokenizer | None = None) -> Flamingo:
    model = drawn_model(config)
    model.save(folder)
    if tokenizer is not None:
        (folder / "tokenizer").mkdir()
        tokenizer.save(str(folder / "tokenizer" / "text_tower.json"))
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flamingo, Path]:
    folder = tmp_path_factory.mktemp("clip")
    model = saved(CLIP, folder / "checkpoint", text_tokenizer())
    flamingo_export.build(folder / "checkpoint", out=folder / "c.bundle", parity="skip")
    return model, folder / "c.bundle"


@pytest.fixture
def encoder(built: tuple[Flamingo, Path]) -> Iterator[ContrastiveEncoder]:
    with flamingo_export.load_encoder(built[1], threads=1) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(12)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return paths


def reference_images(model: Flamingo, config: ModelConfig, pictures: list[Path]) -> np.ndarray:
    """In fp64."""
    wide = model.double()
    assert wide.contrastive is not None
    found = []
    for path in pictures:
        pixels = torch.from_numpy(load_medium(path, config).pixels).double()
        _, pooled = features_and_pooled(wide.vision_encoder, pixels, wide.contrastive.config, wide.contrastive.readout)
        found.append(wide.contrastive.image(pooled)[0])
    return torch.stack(found).numpy()


def test_images_and_texts_are_embedded_as_the_reference_does(
    built: tuple[Flamingo, Path], encoder: ContrastiveEncoder, pictures: list[Path]
) -> None:
    model, _ = built
    np.testing.assert_allclose(encoder.embed_images(pictures), reference_images(model, CLIP, pictures), atol=2e-5)
    texts = ["w1 w2 w3", "a w7", "w1 w2 w3 w4 w5 w6 w7 w8 w9"]
    found = encoder.embed_texts(texts)
    tower = model.double().contrastive
    assert tower is not None
    assert tower.text is not None
    for text, embedding in zip(texts, found, strict=True):
        ids = [BEGIN, *(86 if word == "a" else int(word[1:]) for word in text.split()), END]
        wanted = tower.text(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
        np.testing.assert_allclose(embedding, wanted.numpy(), atol=2e-5)
        np.testing.assert_allclose(encoder.embed_texts([ids])[0], embedding, atol=1e-6)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)


def test_many_texts_keep_their_order(encoder: ContrastiveEncoder) -> None:
    texts = [" ".join(f"w{(i * j) % 86}" for j in range(1 + i % 9)) for i in range(150)]
    together = encoder.embed_texts(texts)
    for place in (0, 63, 64, 149):
        np.testing.assert_allclose(together[place], encoder.embed_texts([texts[place]])[0], atol=2e-5)


def test_a_video_is_the_mean_of_its_frames(encoder: ContrastiveEncoder, pictures: list[Path]) -> None:
    frames = encoder.embed_images(pictures[:3])
    mean = frames.mean(axis=0)
    video = encoder.embed_images([Video(source=pictures[:3])])[0]
    np.testing.assert_allclose(video, mean / np.linalg.norm(mean), atol=1e-5)


def test_labels(built: tuple[Flamingo, Path], encoder: ContrastiveEncoder, pictures: list[Path]) -> None:
    labels = ["w1", "w2 w3", "w4"]
    scores = encoder.classify(pictures[0], labels, template="a {} of")
    image = reference_images(built[0], CLIP, pictures[:1])[0]
    contrastive = built[0].contrastive
    assert contrastive is not None
    assert contrastive.text is not None
    assert contrastive.logit_scale is not None
    ids = [[BEGIN, 86, 1, 87, END], [BEGIN, 86, 2, 3, 87, END], [BEGIN, 86, 4, 87, END]]
    text = contrastive.double().text
    assert text is not None
    texts = torch.cat([text(torch.tensor([each]), torch.tensor([len(each)])) for each in ids])
    logits = torch.from_numpy(image) @ texts.T * contrastive.logit_scale.exp()
    wanted = dict(zip(labels, logits.softmax(0).tolist(), strict=True))
    assert {score.label: score.probability for score in scores} == pytest.approx(wanted, abs=1e-4)
    assert [score.label for score in scores] == sorted(labels, key=lambda label: -wanted[label])
    assert encoder.label_texts(["w9"]) == ["a photo of a w9."]


def test_what_is_refused(encoder: ContrastiveEncoder, pictures: list[Path]) -> None:
    for labels, why in (
        ([], "no labels"),
        ("w1", "no labels"),
        (["w1", " "], "label 2 of 2 is empty"),
        (["w1", "w1"], "'w1' was given twice"),
    ):
        with pytest.raises(InputError, match=why):
            encoder.classify(pictures[0], labels)
    with pytest.raises(InputError, match=r"has 2 places for a label, expected one"):
        encoder.classify(pictures[0], ["w1"], template="{} {}")
    with pytest.raises(PromptError, match="is empty"):
        encoder.embed_texts(["  "])
    with pytest.raises(PromptError, match=r"12 tokens .*takes 1 to 11. Shorten it"):
        encoder.embed_texts([" ".join(WORDS[:10])])
    with pytest.raises(PromptError, match="token 90 is outside"):
        encoder.embed_texts([[90]])
    with pytest.raises(PromptError, match="cannot be encoded"):
        encoder.embed_texts(["w1 \ud800"])


def test_bundles_without_towers(tmp_path: Path, pictures: list[Path]) -> None:
    flamingo_export.build(drawn_model(MPT), out=tmp_path / "m.bundle", parity="skip")
    with pytest.raises(BundleError, match="has no contrastive encoder"):
        flamingo_export.load_encoder(tmp_path / "m.bundle")
    flamingo_export.build(drawn_model(KEPT), out=tmp_path / "k.bundle", parity="skip")
    with flamingo_export.load_encoder(tmp_path / "k.bundle", threads=1) as images_alone:
        assert images_alone.embed_images(pictures[:1]).shape == (1, 14)
        with pytest.raises(InputError, match="no text tower, only an image tower"):
            images_alone.embed_texts(["w1"])
    flamingo_export.build(drawn_model(CLIP), out=tmp_path / "c.bundle", parity="skip")
    assert any("the text tower has no tokenizer" in note for note in read_manifest(tmp_path / "c.bundle").notes)
    with (
        flamingo_export.load_encoder(tmp_path / "c.bundle", threads=1) as without,
        pytest.raises(InputError, match=r"no tokenizer/text_tower\.json.*or give token ids"),
    ):
        without.embed_texts(["w1"])


def test_a_tokenizer_of_another_vocabulary_is_not_taken(tmp_path: Path) -> None:
    saved(CLIP, tmp_path / "checkpoint", text_tokenizer(size=95))
    flamingo_export.build(tmp_path / "checkpoint", out=tmp_path / "c.bundle", parity="skip")
    (note,) = (note for note in read_manifest(tmp_path / "c.bundle").notes if "text tower" in note)
    assert "has 95 tokens, the text tower's vocabulary has 90" in note
    assert not (tmp_path / "c.bundle" / "tokenizer" / "text_tower.json").exists()


def test_search_by_text_and_by_image(
    built: tuple[Flamingo, Path], pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bundle = built
    lines = [json.dumps({"image": str(path), "caption": f"w{index}"}) for index, path in enumerate(pictures)]
    (tmp_path / "shots.jsonl").write_text("\n".join(lines))
    index = tmp_path / "index"
    assert main(["index", str(bundle), "--data", str(tmp_path / "shots.jsonl"), "--out", str(index)]) == 0
    assert Index(index).record.features == EMBEDDINGS
    images = reference_images(model, CLIP, pictures)
    contrastive = model.double().contrastive
    assert contrastive is not None
    assert contrastive.text is not None
    wanted = images @ contrastive.text(torch.tensor([[BEGIN, 5, 6, END]]), torch.tensor([4]))[0].numpy()
    for faiss in ([], ["--faiss"]):
        capsys.readouterr()
        assert main(["search", str(bundle), "--index", str(index), "--text", "w5 w6", "--top", "4", "--json", *faiss]) == 0
        hits = json.loads(capsys.readouterr().out)
        order = np.argsort(-wanted)[:4]
        assert [int(hit["item"]["id"]) - 1 for hit in hits] == order.tolist()
        assert [hit["cosine"] for hit in hits] == pytest.approx(wanted[order].tolist(), abs=1e-4)
    ((same, cosine), *_) = found_by_image(bundle, index, pictures[7], 3)
    assert same.id == "8"
    assert cosine == pytest.approx(1, abs=1e-5)
    assert main(["search", str(bundle), "--index", str(index)]) == 2
    assert main(["search", str(bundle), "--index", str(index), "--text", "w1", "--image", str(pictures[0])]) == 2


def test_an_index_of_features_is_not_searched_by_text(built: tuple[Flamingo, Path], tmp_path: Path) -> None:
    from flamingo_export.bundle.identity import bundle_digest

    digest = bundle_digest(read_manifest(built[1]))
    rows = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    items = [IndexedItem(id=str(place)) for place in range(3)]
    build_index(tmp_path / "i", items, lambda places: (rows[place] for place in places), bundle=digest, features=MEAN_FEATURES)
    with pytest.raises(
        EvaluationError, match="holds mean-pooled features of the vision encoder, which texts cannot be compared"
    ):
        found_by_text(built[1], tmp_path / "i", "w1", 2)


def test_faiss_finds_what_exact_search_finds(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed: extra faiss")
    from flamingo_export.evaluation.index.with_faiss import FaissIndex

    rows = np.random.default_rng(1).standard_normal((500, 16)).astype(np.float32)
    items = [IndexedItem(id=str(place)) for place in range(len(rows))]
    index = build_index(tmp_path / "i", items, lambda places: (rows[place] for place in places), bundle="b" * 64, features="x")
    queries = np.random.default_rng(2).standard_normal((20, 16)).astype(np.float32)
    found, cosines = FaissIndex(index).nearest(queries, 9)
    wanted, exact = nearest(index, queries, 9)
    assert found.tolist() == wanted.tolist()
    np.testing.assert_allclose(cosines, exact, atol=1e-6)
    with pytest.raises(EvaluationError, match="16 wide"):
        FaissIndex(index).nearest(queries[:, :5], 3)


def test_classify_on_the_command_line(
    built: tuple[Flamingo, Path], pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, image = str(built[1]), str(pictures[3])
    assert main(["classify", bundle, "--image", image, "--labels", "w1, w2,w3", "--template", "{}", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert {label["label"] for label in found["labels"]} == {"w1", "w2", "w3"}
    assert sum(label["probability"] for label in found["labels"]) == pytest.approx(1)
    assert main(["classify", bundle, "--image", image, "--image", str(pictures[4]), "--labels", "w1,w2"]) == 0
    assert "probability" in capsys.readouterr().out
    assert main(["classify", bundle, "--image", image, "--labels", "w1,,w2"]) == 2


def test_the_model_is_the_same_with_and_without_its_towers(tmp_path: Path) -> None:
    """Digest, origin and golden values are the model's; another contrastive encoder is named as such."""
    with_towers = saved(READ, tmp_path / "with")
    plain = msgspec.structs.replace(READ, contrastive=None)
    without = drawn_model(plain)
    without.load_state_dict({n: t for n, t in with_towers.state_dict().items() if not n.startswith("contrastive.")})
    without.save(tmp_path / "without")
    flamingo_export.build(tmp_path / "without", out=tmp_path / "old.bundle", parity="skip")
    flamingo_export.build(tmp_path / "with", out=tmp_path / "new.bundle", parity="skip")
    old, new = read_manifest(tmp_path / "old.bundle"), read_manifest(tmp_path / "new.bundle")
    assert old.source.sha256 == new.source.sha256
    assert (old.source.towers_sha256, new.source.towers_sha256 is None) == (None, False)
    assert find_origin(old, tmp_path / "with").config == plain
    assert find_origin(new, tmp_path / "with").config == READ
    with pytest.raises(CheckpointError, match="has another contrastive encoder"):
        find_origin(new, tmp_path / "without")
    refitted = flamingo_export.refit(tmp_path / "old.bundle", tmp_path / "with", out=tmp_path / "r.bundle", parity="skip")
    assert refitted.manifest.config == plain
    assert CheckpointSource(tmp_path / "with").without_towers().names() == CheckpointSource(tmp_path / "without").names()
