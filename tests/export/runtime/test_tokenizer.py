"""Text to ids and back, piece by piece."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from flamingo_export.errors import BundleError, PromptError
from flamingo_export.runtime.steering import HoldBack
from flamingo_export.runtime.tokenizer import TextStream, Tokenizer
from flamingo_reference.config import NANO, ModelConfig

SPECIAL = ["<PAD>", "<BOS>", "<EOC>", "<image>"]


def byte_level(special: list[str] = SPECIAL) -> FastTokenizer:
    """Bytes, and a few merged words with the space before them."""
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("Ġ", "r"), ("Ġr", "e"), ("Ġre", "d"), ("r", "e"), ("re", "d")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def metaspace() -> FastTokenizer:
    """As SentencePiece has it: blanks as ▁, unknown characters as bytes."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeghilnorst", "▁red", "▁the"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, fuse_unk=True, unk_token="<PAD>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


BYTES, PIECES = Tokenizer(byte_level(), NANO), Tokenizer(metaspace(), NANO)


def test_tags_are_one_token_and_bos_stands_once() -> None:
    ids = BYTES.encode("<image>Output: red<EOC><image>Output:")
    assert ids[:2] == [1, 3]
    assert (ids.count(1), ids.count(2), ids.count(3)) == (1, 1, 2)
    assert BYTES.encode("<BOS><image>Output: red<EOC><image>Output:") == ids
    assert BYTES.encode("red", add_bos=False) == BYTES.encode("red")[1:]
    assert BYTES.decode(ids) == "Output: redOutput:"


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_prompt(text: str) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        BYTES.encode(text)


def test_a_candidate_continues_its_prompt() -> None:
    red = BYTES.encode_continuation("Answer:", "red")
    assert red == BYTES.encode_continuation("Answer:", " red") == BYTES.encode(" red", add_bos=False)
    assert len(red) == 1
    assert BYTES.encode_continuation("Answer: ", "red") == BYTES.encode_continuation("Answer: ", " red") == red
    for end in ("\n", "\n "):
        assert BYTES.encode_continuation(f"Answer:{end}", "red") == BYTES.encode("red", add_bos=False)
    assert BYTES.encode_continuation("Answer:", "red<EOC>") == [*red, 2]
    for tokenizer in (BYTES, PIECES):  # nothing is said before it, not a blank either
        assert tokenizer.encode_continuation("Answer:", "<EOC>") == tokenizer.encode_continuation("Answer: ", "<EOC>") == [2]
    assert PIECES.decode(PIECES.encode_continuation("the", "red")) == "red"
    with pytest.raises(PromptError, match="empty"):
        BYTES.encode_continuation("Answer:", " ")


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(min_size=1, max_size=12),
    ids=st.lists(st.integers(0, 264), max_size=12),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "metaspace"])
def test_pieces_join_to_the_whole_and_no_character_is_torn(
    tokenizer: Tokenizer, text: str, ids: list[int], cuts: list[int]
) -> None:
    """Real text first, then any bytes that a model may come up with."""
    tokens = (tokenizer.encode(text, add_bos=False) if text.strip() else []) + [2]
    for sequence in (tokens, ids):
        whole = tokenizer.decode(sequence)
        stream, pieces, start = TextStream(tokenizer), [], 0
        for cut in [*cuts, *[1] * len(sequence)]:
            pieces.append(stream.push(sequence[start : start + cut]))
            start += cut
        pieces.append(stream.finish())
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == whole


def test_a_character_of_four_bytes_comes_whole() -> None:
    stream = TextStream(BYTES)
    pieces = [stream.push([token]) for token in BYTES.encode("a🦩b", add_bos=False)]
    assert pieces == ["a", "", "", "", "🦩", "b"]
    assert stream.finish() == ""


def test_a_character_that_is_never_finished_is_shown_at_the_end() -> None:
    stream = TextStream(BYTES)
    tokens = BYTES.encode("a🦩", add_bos=False)[:-1]
    assert [stream.push([token]) for token in tokens] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    "given",
    [
        "é🦩".encode()[:-1],
        "é🦩".encode()[:-2],
        b"\xff" + "日本".encode(),
        "日".encode() + b"\xa9" + "本".encode(),
        b"\xe2\x82A\xf0\x9f",
    ],
)
def test_a_broken_byte_takes_no_other_character_with_it(given: bytes) -> None:
    """Python's own decoder, which replaces what belongs to no character, is the oracle; one token a byte, as LLaMA's vocabulary has them."""
    fast = metaspace()
    found = [fast.token_to_id(f"<0x{byte:02X}>") for byte in given]
    tokens = [token for token in found if token is not None]
    assert len(tokens) == len(given)
    assert PIECES.decode(tokens) == given.decode("utf-8", errors="replace")
    stream = TextStream(PIECES)
    assert "".join(stream.push([token]) for token in tokens) + stream.finish() == PIECES.decode(tokens)


def test_a_stripped_stream_has_no_blanks_at_its_ends() -> None:
    for text in ("  a b  c ", "a", "  ", " \n a\n"):
        stream, hold = TextStream(BYTES), HoldBack((), strip=True)
        pieces = [hold.push(stream.push([token])) for token in BYTES.encode("x" + text, add_bos=False)[1:]]
        assert "".join(pieces) + hold.push(stream.finish()) + hold.finish() == text.strip()


def test_special_tokens_in_plain_text_are_found_as_the_tokenizer_reads_them() -> None:
    fast = byte_level()
    fast.normalizer = normalizers.NFKC()
    fast.add_special_tokens([AddedToken("</s>", special=True, normalized=True)])
    tokenizer = Tokenizer(fast, NANO)
    for text in ("a </s> b", "<PAD>", "\uff1c/s\uff1e"):
        assert set(tokenizer.encode(text, add_bos=False)) & tokenizer.special
        with pytest.raises(PromptError, match="which the model reads as a token of its own"):
            tokenizer.check_quoted(text)
    for text in ("a < /s> b", "1 < 2 > 0", "<pad>", "é🦩"):
        assert not set(tokenizer.encode(text, add_bos=False)) & tokenizer.special
        tokenizer.check_quoted(text)


def test_tags_of_another_family_are_found() -> None:
    for tag in ("<|endofchunk|>", "<fake_token_around_image>", "<end_of_utterance>"):
        with pytest.raises(PromptError, match=r"a tag of another family of models.*<BOS>, <EOC>, <image>"):
            BYTES.check_tags(f"<image>Output: x{tag}")
    BYTES.check_tags("<BOS><image>Output: <s>struck</s> out<EOC>")  # HTML is plain text where the tags are others


def test_tokenizers_of_another_vocabulary() -> None:
    small: ModelConfig = msgspec.structs.replace(
        NANO, language_model=msgspec.structs.replace(NANO.language_model, vocab_size=200)
    )
    with pytest.raises(PromptError, match="the tokenizer has ids up to 264, the model embeds 200 tokens"):
        Tokenizer(byte_level(), small)
    with pytest.raises(PromptError, match=r"another vocabulary: <EOC> is missing, expected 2; <image> is 2, expected 3"):
        Tokenizer(byte_level(["<PAD>", "<BOS>", "<image>", "<end>"]), NANO)


def test_opening(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no tokenizer"):
        Tokenizer.open(tmp_path, NANO)
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.open(tmp_path, NANO)
    cut = byte_level()
    cut.enable_truncation(3)
    cut.enable_padding(length=10)
    cut.save(str(path))
    assert len(Tokenizer.open(tmp_path, NANO).encode("red red red red red")) == 6
