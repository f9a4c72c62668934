"""Samples: files and their faults, what is too little, the shipped set with every kind of tokenizer."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from llama_chat import TEMPLATE
from PIL import Image
from variations import IDEFICS, MPT, NEOX, drawn_model

from flamingo_calibration import BadSample, Sample, calibrate, nano_samples, read_samples, shipped_samples, source_tokenizer
from flamingo_calibration.samples import check_samples
from flamingo_calibration.shipped import _documents
from flamingo_export.errors import CalibrationError
from flamingo_export.runtime.videos import Video
from flamingo_export.sources import LiveSource, RandomSource, open_source
from flamingo_export.sources.choice import source_for_size
from flamingo_export.sources.origin import source_digest
from flamingo_reference import input_format
from flamingo_reference.config import NANO


@pytest.fixture
def nano():
    return RandomSource(NANO, 1)


@pytest.fixture
def write(tmp_path):
    """Writes a calibration file of lines, objects or texts, with a.png, b.png, cut.png and clip.gif beside it."""
    rng = np.random.default_rng(2)
    images = [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]
    images[0].save(tmp_path / "a.png")
    images[1].save(tmp_path / "b.png")
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:], duration=100)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])

    def file(*lines):
        path = tmp_path / "calib.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
        return path

    return file


LONG = "<image>Output: " + "two dogs on a beach, " * 12
GOOD = {"prompt": LONG, "images": ["a.png"]}


def test_lines_of_every_kind(write, tmp_path, nano):
    path = write(
        GOOD,
        "",
        {"text": "Two dogs.", "images": ["a.png", "b.png"]},
        {"text": "No image."},
        {"prompt": "<image>x", "videos": ["clip.gif"]},
    )
    samples = read_samples(path)
    assert [sample.name for sample in samples] == ["line 1", "line 3", "line 4", "line 5"]
    assert samples[1] == Sample(prompt="<image><image>Two dogs.", media=[tmp_path / "a.png", tmp_path / "b.png"], name="line 3")
    assert isinstance(samples[3], Sample)
    assert samples[3].media == [Video(source=tmp_path / "clip.gif")]
    checked = check_samples(samples, nano, source_tokenizer(nano))
    assert [sample.frames for sample in checked.samples] == [(1,), (1, 1), (), (3,)]
    assert (checked.num_media, checked.skipped) == (4, 0)
    assert checked.samples[1].phi.tolist()[:4] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{no json", "not JSON"),
        ('{"prompt": "x", "prompt": "y"}', "prompt is given twice"),
        ([1], "a JSON list"),
        ({"prompt": "x", "image": "a.png"}, "unknown keys image"),
        ({"images": ["a.png"]}, "give one of prompt"),
        ({"prompt": "x", "text": "y"}, "give one of prompt"),
        ({"prompt": "<image>", "images": ["a.png"], "videos": []}, "both images and videos"),
        ({"text": "  "}, "not empty"),
        ({"text": 3}, "not empty"),
        ({"text": "x", "images": "a.png"}, "a list of paths"),
        ({"text": "x", "images": [1]}, "a list of paths"),
        ({"text": "x", "images": ["a\0.png"]}, "a list of paths"),
        ({"text": "<image>x", "images": ["a.png"]}, "call it prompt"),
        ({"prompt": "<image>x", "images": ["missing.png"]}, "missing.png does not exist"),
        ({"prompt": "<image>x", "images": ["https://x.org/b.png"]}, "https://x.org/b.png is a URL, and URLs are not fetched"),
        ({"prompt": "<image>x", "images": ["cut.png"]}, "cut.png is damaged or truncated"),
        ({"prompt": "<image>x", "images": ["calib.jsonl"]}, "is not an image"),
        ({"prompt": "<image>x", "images": ["clip.gif"]}, "has 3 frames"),
        ({"prompt": "<image><image>x", "images": ["a.png"]}, "2 <image> tags, but 1 image"),
        ({"prompt": "x", "images": ["a.png"]}, "0 <image> tags, but 1 image"),
    ],
)
def test_a_bad_line_is_named_or_left_out_and_counted(write, nano, recorder, line, reason):
    samples = read_samples(write(GOOD, line, GOOD))
    tokenizer = source_tokenizer(nano)
    with pytest.raises(CalibrationError, match=r"1 of 3 samples cannot be used: line 2: .*--skip-bad") as failed:
        check_samples(samples, nano, tokenizer)
    assert reason in str(failed.value)
    checked = check_samples(samples, nano, tokenizer, skip_bad=True, progress=recorder)
    assert (len(checked.samples), checked.skipped) == (2, 1)
    assert reason in recorder.notes[0]
    assert "1 of 3 samples were left out: line 2" in recorder.notes[0]


def test_all_bad_lines_are_told_at_once(write, nano):
    samples = read_samples(write(*["{"] * 25, GOOD))
    with pytest.raises(CalibrationError, match=r"25 of 26 samples cannot be used: line 1: .* and 5 more"):
        check_samples(samples, nano, source_tokenizer(nano))


def test_too_few_tokens_and_no_image(write, nano):
    tokenizer = source_tokenizer(nano)
    with pytest.raises(CalibrationError, match="1 samples with 9 tokens are too few, at least 256"):
        check_samples(read_samples(write({"prompt": "<image>a photo", "images": ["a.png"]})), nano, tokenizer)
    with pytest.raises(CalibrationError, match="no sample has an image"):
        check_samples(read_samples(write({"text": "words " * 60})), nano, tokenizer)
    with pytest.raises(CalibrationError, match="0 samples with 0 tokens"):
        check_samples([BadSample(name="x", reason="y")], nano, tokenizer, skip_bad=True)


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        read_samples(tmp_path / "missing.jsonl")
    with pytest.raises(CalibrationError, match="cannot be read: Is a directory"):
        read_samples(tmp_path)
    with pytest.raises(CalibrationError, match=r"has no lines\. A line is like"):
        read_samples(write("", " "))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read_samples(tmp_path / "binary")


def test_text_needs_a_tokenizer_and_rotary_models_have_an_end():
    source = LiveSource(drawn_model(NEOX))
    assert source_tokenizer(source) is None
    with pytest.raises(CalibrationError, match="no tokenizer"):
        check_samples([Sample(prompt="x")], source, None)
    with pytest.raises(CalibrationError, match="129 tokens, the model has 128 positions"):
        check_samples([Sample(prompt=[5] * 129)], source, None)


def test_the_digest_follows_content_not_files(write, nano, tmp_path):
    tokenizer = source_tokenizer(nano)
    first = check_samples(read_samples(write(GOOD)), nano, tokenizer).sha256
    Image.open(tmp_path / "a.png").save(tmp_path / "same.bmp")
    assert check_samples(read_samples(write("", {**GOOD, "images": ["same.bmp"]})), nano, tokenizer).sha256 == first
    assert check_samples(read_samples(write({**GOOD, "images": ["b.png"]})), nano, tokenizer).sha256 != first
    assert check_samples(read_samples(write({**GOOD, "prompt": LONG + "!"})), nano, tokenizer).sha256 != first


def test_the_shipped_set_is_the_same_at_every_call_and_fits_every_model(config):
    source = LiveSource(drawn_model(config))
    one, two = (check_samples(shipped_samples(config, None), source, None) for _ in range(2))
    assert one.sha256 == two.sha256
    assert 512 <= one.num_tokens < 600
    assert one.num_media >= 6
    assert any(frames > 1 for sample in one.samples for frames in sample.frames) == (
        config.tiled is None
    )  # no videos for tiles
    assert any(not sample.media for sample in one.samples)


@pytest.mark.parametrize("trained", [True, False])
def test_the_shipped_set_with_a_tokenizer_of_words_and_of_bytes(trained):
    source = open_source(source_for_size("nano", seed=None if trained else 1))
    tokenizer = source_tokenizer(source)
    checked = check_samples(shipped_samples(source.config, tokenizer, source.inputs), source, tokenizer)
    assert 512 <= checked.num_tokens < 1000
    assert checked.num_media >= 6
    assert len(checked.samples) >= 6


def test_the_shipped_set_speaks_as_the_model_does():
    samples = shipped_samples(NANO, source_tokenizer(RandomSource(NANO, 1)), input_format.IDEFICS)
    assert any("User:<fake_token_around_image><image><fake_token_around_image>" in str(sample.prompt) for sample in samples)
    assert {str(sample.prompt).count("<image>") == len(sample.media) for sample in samples} == {True}


def test_the_shipped_set_takes_turns_by_a_chat_template():
    inputs = input_format.with_template(input_format.LLAMA_VISION_INSTRUCT, TEMPLATE)
    samples = list(itertools.islice(_documents(inputs, videos=False), 6))
    asked = "<|start_header_id|>user<|end_header_id|>\n\n<|image|>"
    answered = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert str(samples[0].prompt).count(asked) == 2
    assert str(samples[0].prompt).count(answered) == 2
    assert answered + " " not in str(samples[0].prompt)
    assert str(samples[0].prompt).endswith("<|eot_id|>")
    assert {str(sample.prompt).count("<|image|>") == len(sample.media) for sample in samples} == {True}
    assert not any(isinstance(medium, Video) for sample in samples for medium in sample.media)


def test_nano_pages(nano):
    checked = check_samples(nano_samples(), nano, source_tokenizer(nano))
    assert len(checked.samples) == 64
    assert checked.num_media == 160
    assert max(frames for sample in checked.samples for frames in sample.frames) > 1


@pytest.mark.slow
def test_the_digest_of_weights_is_the_manifests():
    source = open_source(source_for_size("nano"))
    tokenizer = source_tokenizer(source)
    table = calibrate(source, shipped_samples(source.config, tokenizer, source.inputs), tokenizer=tokenizer)
    assert table.weights_sha256 == source_digest(source)


def test_damaged_weights_name_the_tensor():
    model = drawn_model(MPT)
    layer: Any = model.language_model.layers[2]
    layer.ffw_up.weight[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match=r"decoder/layer\.2/ffw_down are NaN or infinite"):
        calibrate(LiveSource(model), shipped_samples(MPT, None), tokenizer=None)


def test_constant_activations_name_the_tensor():
    model = drawn_model(NEOX)
    layer: Any = model.language_model.layers[1]
    layer.ffw_norm.weight.zero_()
    layer.ffw_norm.bias.fill_(0.5)
    with pytest.raises(CalibrationError, match=r"decoder/layer\.1/ffw_up is 0\.5 in all"):
        calibrate(LiveSource(model), shipped_samples(NEOX, None), tokenizer=None)


def test_zeros_are_recorded_and_told(recorder):
    model = drawn_model(IDEFICS)
    gated: Any = model.cross_attention[1]
    gated.v_proj.weight.zero_()
    table = calibrate(LiveSource(model), shipped_samples(IDEFICS, None), tokenizer=None, progress=recorder)
    silent = {name for name, found in table.tensors.items() if not found.amax}
    assert silent == {"media_kv/layer.1/v", "decoder/layer.2/cross_attention/out_proj"}
    assert {table.threshold(name) for name in silent} == {1.0}
    assert all(name in recorder.notes[-1] for name in silent)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [0.0, -0.3, 1e-6])
def test_gates_do_not_change_what_their_products_take(relative, calibrated, gate):
    """The gate lies in the weights of the product, behind its input: even where it is zero there is something to scale."""
    model = drawn_model(relative)
    gated: Any = model.cross_attention[0]
    gated.attention_gate.fill_(gate)
    table = calibrate(LiveSource(model), shipped_samples(relative, None), tokenizer=None)
    name = "decoder/layer.2/cross_attention/out_proj"
    assert msgspec.structs.asdict(table.tensors[name]) == msgspec.structs.asdict(calibrated(relative).tensors[name])


def test_an_image_behind_all_text_is_seen_by_its_own_position(relative):
    """Text before its only image sees no medium: zeros, but for the image's own position."""
    from flamingo_calibration.shipped import picture

    samples = [Sample(prompt=[1, *range(6, 66)] * 4 + [6, 7, 8, 9] * 5 + [3], media=[picture(1)])]
    table = calibrate(LiveSource(drawn_model(relative)), samples, tokenizer=None)
    assert table.tensors["decoder/layer.2/cross_attention/out_proj"].amax > 0
