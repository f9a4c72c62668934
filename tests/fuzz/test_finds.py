"""What fuzzing found, each by name. Those of images and videos stand beside their other tests."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers

import flamingo_export
from flamingo_export.bundle.bundled_tokenizer import checked_text_tokenizer, checked_tokenizer
from flamingo_export.bundle.manifest import MANIFEST_NAME, read_manifest
from flamingo_export.cli import main
from flamingo_export.errors import BackendError, BundleError, InputError, PromptError
from flamingo_export.errors import CheckpointError as BuildCheckpointError
from flamingo_export.runtime.sampling import GREATEST_TEMPERATURE
from flamingo_export.sources.checkpoint import CheckpointSource
from flamingo_export.weights import WeightIndex
from flamingo_reference.checkpoints.files.sentencepiece_model import read_sentencepiece
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.files.torch_file import open_torch_file
from flamingo_reference.contrastive_config import TextConfig

from tests.fuzz.test_fuzz_bundles import with_digest  # isort: skip
from tests.fuzz.test_fuzz_checkpoints import message, openflamingo, sentencepiece  # isort: skip

if TYPE_CHECKING:
    from tests.fuzz.conftest import Copy


def altered(bundle: Path, to: Path, with_file: Copy, name: str, content: bytes) -> Path:
    """The bundle with another file, whose digest fits."""
    manifest = (bundle / MANIFEST_NAME).read_bytes()
    changed = with_file(bundle, to, name, content)
    (changed / MANIFEST_NAME).unlink()
    (changed / MANIFEST_NAME).write_bytes(with_digest(manifest, name, content))
    return changed


def weights_of(bundle: Path) -> tuple[str, bytes]:
    path = sorted((bundle / "weights").glob("*.safetensors"))[0]
    return path.relative_to(bundle).as_posix(), path.read_bytes()


def test_a_bundles_weights_without_a_header_are_an_error_of_the_bundle(bundle: Path, tmp_path: Path, with_file: Copy) -> None:
    """It was one of the reference's, which the command line does not know."""
    name, whole = weights_of(bundle)
    changed = altered(bundle, tmp_path / "b", with_file, name, whole[:8] + b"x" + whole[9:])
    with pytest.raises(BundleError, match="malformed safetensors header"):
        flamingo_export.load(changed)


def test_elements_that_no_bundle_has(bundle: Path, tmp_path: Path, with_file: Copy) -> None:
    name, whole = weights_of(bundle)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first = next(each for each in header if each != "__metadata__")
    header[first]["dtype"] = "I32" if header[first]["dtype"] == "F32" else "I16"
    text = json.dumps(header).encode()
    changed = altered(bundle, tmp_path / "b", with_file, name, len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(BundleError, match=r"has elements of type int\d+, which no bundle has"):
        WeightIndex.read(changed)


def test_a_graph_whose_error_is_no_text(bundle: Path, tmp_path: Path, with_file: Copy) -> None:
    """ONNX Runtime quotes the file's bytes in its message, which Python then cannot decode."""
    name = next(graph.file for graph in read_manifest(bundle).graphs if graph.name == "decoder")
    whole = (bundle / name).read_bytes()
    place = whole.index(b"Attention") if b"Attention" in whole else whole.index(b"MatMul")
    content = whole[:place] + b"\xc9\xff" + whole[place + 2 :]
    with pytest.raises(BundleError, match="cannot be loaded by onnxruntime"):
        flamingo_export.load(altered(bundle, tmp_path / "b", with_file, name, content))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("limits", "bank_rows"), 2**31 - 1, "limits.bank_rows is 2147483647, expected 1 to"),
        (("limits", "max_length"), 2**53, "limits.max_length is 9007199254740992, expected 1 to"),
        (("config", "vision", "image_size"), 2**31, "config.vision.image_size is 2147483648, expected at most 4096"),
        (("config", "vision", "feature_width"), 10**9, "config.vision.feature_width is 1000000000, expected at most"),
        (("graphs", 0, "layers"), [0, 10**9], r"has the layers \[0, 1000000000\], expected some of the 3"),
    ],
)
def test_numbers_that_would_take_all_memory(
    bundle: Path, tmp_path: Path, with_file: Copy, place: tuple[Any, ...], value: Any, message: str
) -> None:
    raw = json.loads((bundle / MANIFEST_NAME).read_bytes())
    holder = raw
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    changed = with_file(bundle, tmp_path / "b", MANIFEST_NAME, json.dumps(raw).encode())
    with pytest.raises(BundleError, match=message):
        flamingo_export.load(changed)


def test_a_buffer_that_no_memory_holds(bundle: Path) -> None:
    with flamingo_export.load(bundle) as model, pytest.raises(BackendError, match="does not fit in memory"):
        model.engines.decoder.allocate(model.engines.decoder.spec.inputs[0].name, (2**45,))


def test_inspect_of_a_model_that_cannot_be(
    bundle: Path, tmp_path: Path, with_file: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((bundle / MANIFEST_NAME).read_bytes())
    raw["config"]["vision"]["depths"].append(1)
    changed = with_file(bundle, tmp_path / "b", MANIFEST_NAME, json.dumps(raw).encode())
    with pytest.raises(BundleError, match="is invalid"):
        read_manifest(changed)
    assert main(["inspect", str(changed)]) == 1
    assert "is invalid" in capsys.readouterr().err


def test_a_tokenizer_that_panics(bundle: Path, tmp_path: Path, with_file: Copy) -> None:
    """A damaged table of characters takes the library beyond its end; what it raises then is not an Exception."""
    tokenizer = FastTokenizer.from_file(str(bundle / "tokenizer" / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Precompiled(b"\0\0\0\0" + b"a" * 20)
    changed = altered(bundle, tmp_path / "b", with_file, "tokenizer/tokenizer.json", tokenizer.to_str().encode())
    with flamingo_export.load(changed) as model, pytest.raises(PromptError, match="tokenizer cannot encode 'héllo'"):
        model.generate("héllo", max_new_tokens=1)


@pytest.mark.parametrize("index", [5_000, 1_000_000])
def test_an_id_beyond_the_vocabulary_is_refused_by_the_build(published: Path, tmp_path: Path, index: int) -> None:
    """As many tokens as the model has, one of them with an id that it does not have: the bundle could not be loaded, and from some thousand
    million on the library ended the process when the tokenizer was written."""
    content = json.loads((published / "openflamingo-tiny" / "mpt" / "tokenizer.json").read_bytes())
    words = content["model"]["vocab"]
    words[list(words)[7]] = index
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    source = CheckpointSource(openflamingo(published / "openflamingo-tiny"))
    with pytest.raises(
        BuildCheckpointError, match=f"the id {index}, the model has {source.config.language_model.embedding_rows}"
    ):
        checked_tokenizer(path, source.config, source.inputs.tags)
    size = FastTokenizer.from_file(str(path)).get_vocab_size()
    tower = TextConfig(vocab_size=size, width=8, num_layers=1, num_heads=1, ffw_width=8, max_positions=8)
    with pytest.raises(BuildCheckpointError, match=f"the id {index}"):
        checked_text_tokenizer(path, tower)


def test_a_tokenizer_without_a_token_for_what_it_does_not_know(bundle: Path, tmp_path: Path, with_file: Copy) -> None:
    raw = json.loads((bundle / "tokenizer" / "tokenizer.json").read_bytes())
    words = FastTokenizer(models.WordLevel({f"w{index}": index for index in range(262)}, unk_token="missing"))
    raw["model"] = json.loads(words.to_str())["model"]
    vocabulary = {token["content"]: token["id"] for token in raw["added_tokens"]}
    raw["model"]["vocab"] = {
        word: index for word, index in raw["model"]["vocab"].items() if index not in vocabulary.values()
    } | vocabulary
    changed = altered(bundle, tmp_path / "b", with_file, "tokenizer/tokenizer.json", json.dumps(raw).encode())
    with flamingo_export.load(changed) as model, pytest.raises(PromptError, match="tokenizer cannot encode 'other'"):
        model.generate("other", max_new_tokens=1)


@pytest.mark.parametrize("prompt", [3, None, {"a": 1}, b"Output:", [[1], [2, 3]], [None], [10**30]])
def test_prompts_that_are_none(bundle: Path, prompt: Any) -> None:
    with flamingo_export.load(bundle) as model:
        for given in (prompt, flamingo_export.Request(prompt=prompt)):
            with pytest.raises(PromptError):
                model.generate(given, max_new_tokens=1)


@pytest.mark.parametrize("candidates", [3, {"a": 1}, [3], [None], [["red"]], [[1.5]], [b"red"]])
def test_candidates_that_are_none(bundle: Path, candidates: Any) -> None:
    with flamingo_export.load(bundle) as model, pytest.raises(InputError, match=r"candidate"):
        model.score("Output:", candidates)


def test_num_return_of_none(bundle: Path) -> None:
    with flamingo_export.load(bundle) as model, pytest.raises(InputError, match="num_return is None, expected a whole number"):
        model.generate("Output:", num_return=None)  # type: ignore[call-overload]


def test_a_temperature_beyond_32_bits(bundle: Path) -> None:
    """A number that fp32 does not hold; from far below it on, all tokens are as likely."""
    with flamingo_export.load(bundle) as model:
        hot, hotter = (
            model.generate("Output:", temperature=value, seed=3, max_new_tokens=5) for value in (GREATEST_TEMPERATURE, 1e308)
        )
    assert hot.token_ids == hotter.token_ids


def test_sentencepiece_fields_of_another_kind(tmp_path: Path) -> None:
    """A piece without a text, and numbers where texts are: one would be taken for the length of so many zeros."""
    path = tmp_path / "tokenizer.model"
    whole = sentencepiece()
    for broken in (
        message((1, message((2, 1.0)))),
        message((1, message((1, 2**40), (2, 1.0)))),
        message((3, message((2, 2**40)))),
    ):
        path.write_bytes(whole + broken)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model (is not a SentencePiece model|makes no tokenizer)"):
            read_sentencepiece(path)
    path.write_bytes(whole + message((3, message((2, b"\xff" * 50)))))
    with pytest.raises(CheckpointError, match="makes no tokenizer"):
        read_sentencepiece(path)


def test_a_torch_file_whose_names_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/dätä.pkl", b"")
        archive.writestr("model/data.pkl", b"")
    whole = path.read_bytes()
    path.write_bytes(whole.replace("ä".encode(), b"\x80\x80"))
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        open_torch_file(path)


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["a password", "unknown compression"])
def test_torch_files_that_zipfile_does_not_read(tmp_path: Path, offset: int, value: int) -> None:
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}.")
    whole = bytearray(path.read_bytes())
    struct.pack_into("<H", whole, whole.index(b"PK\1\2") + offset, value)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        open_torch_file(path)
