"""Published files: what is wrong with one is said by file and line, and all of it at once."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.reading import (
    Faults,
    first_of,
    line_of,
    read_csv,
    read_json,
    refuse_duplicates,
    seconds,
    text_of,
    whole_number,
)


class Row(msgspec.Struct):
    b: int


class Table(msgspec.Struct):
    names: dict[str, int] = {}
    rows: list[list[int]] = []
    each: dict[str, list[Row]] = {}


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (
        ("gone", r"gone does not exist; expected the answers"),
        ("", r" is a folder; expected the answers"),
        ("latin", r"latin is not UTF-8 text \(.*position 3.*\); expected the answers"),
        ("loop", r"loop cannot be read \(.+\); expected the answers"),
    ):
        with pytest.raises(EvaluationError, match=words):
            text_of(tmp_path / name, "the answers")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert text_of(tmp_path / "t", "a text") == "a\r\nb"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"rows": [\n[1],\n[2, "x"]]}', r"t\.json, line 3 \(rows\[1\]\[1\]\): Expected `int`, got `str`; expected a table"),
        # The key at fault is not named by the reader: the place of what holds it is given.
        ('{"rows": [],\n"names": {"a": 1,\n"b": "x"}}', r"t\.json, line 2 \(names\): Expected `int`, got `str`"),
        ('{"rows": [],\n"each": {"a":\n[{"c": 1}]}}', r"t\.json, line 2 \(each\): Object missing required field `b`"),
        ("[\n]", r"t\.json, line 1: Expected `object`, got `array`"),
        ('{"rows": [\n[1', r"t\.json, line 2: not JSON \(.*\)\. The file ends too early: was its download interrupted\?"),
        ('{"rows": [\n[1,]]}', r"t\.json, line 2: not JSON \([^)]*\)\.$"),
        ('{"more": ' + "[" * 100_000 + "]" * 100_000 + "}", r"t\.json: not JSON that can be read \(.*recurs"),
    ],
    ids=["a value", "a key without a name", "below a key without a name", "the whole", "cut off", "a comma", "too deep"],
)
def test_what_is_wrong_with_json(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(EvaluationError, match=words):
        read_json(tmp_path / "t.json", Table, "a table")


def test_where_a_value_stands(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{\n"a": {"x": "}",\n"b":\n[7,\n8]},\n"c": 1}')
    path = tmp_path / "t.json"
    assert [line_of(path, *keys) for keys in ((), ("a",), ("a", "b"), ("a", "b", 1), ("c",))] == [1, 2, 4, 5, 6]
    # Where there is no such value, what would hold it.
    assert [line_of(path, *keys) for keys in (("a", "z"), ("a", "b", 2), ("a", "b", "x"), (0,))] == [2, 4, 4, 1]


def test_what_is_wrong_with_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n\n3,4,5\n6\n7,8\n")
    with pytest.raises(EvaluationError) as caught:
        list(read_csv(path, ("a",), "rows"))
    assert str(caught.value).splitlines() == [
        f"{path}, line 4: 3 fields, the header has 2",
        f"{path}, line 5: 1 fields, the header has 2",
    ]
    path.write_text('a,b\n1,"2\nand"\n\n3,4\n')
    assert list(read_csv(path, ("b", "a"), "rows")) == [(3, {"a": "1", "b": "2\nand"}), (5, {"a": "3", "b": "4"})]
    with pytest.raises(EvaluationError, match=r"line 1: no column c, d; expected rows"):
        list(read_csv(path, ("a", "c", "d"), "rows"))
    path.write_text(f"a,b\n1,2\n{'x' * 200_000},4\n")
    with pytest.raises(EvaluationError, match=r"t\.csv, line 3: not CSV \(field larger than field limit"):
        list(read_csv(path, ("a",), "rows"))


def test_the_first_file_that_is_there(tmp_path: Path) -> None:
    for name in ("b", "c"):
        (tmp_path / name).touch()
    assert first_of(tmp_path, ("a", "b", "c"), "the questions") == tmp_path / "b"
    with pytest.raises(EvaluationError, match="has none of x, y; expected the questions"):
        first_of(tmp_path, ("x", "y"), "the questions")
    with pytest.raises(EvaluationError, match="b is not a folder; expected one with the questions"):
        first_of(tmp_path / "b", ("x",), "the questions")


def test_numbers_of_a_field() -> None:
    assert [whole_number(each) for each in ("12", " -3 ", "1.5", "", "x")] == [12, -3, None, None, None]
    assert [seconds(each) for each in ("1.5", "0", "-1", "inf", "nan", "", "x")] == [1.5, 0, None, None, None, None, None]


def test_faults_are_said_together_and_no_more_than_eight(tmp_path: Path) -> None:
    faults = Faults()
    faults.check()
    assert not faults
    refuse_duplicates(tmp_path, ["a", "b", *"a" * 9], range(1, 12), faults)
    assert faults
    with pytest.raises(EvaluationError) as caught:
        faults.check()
    lines = str(caught.value).splitlines()
    assert len(lines) == 9
    assert lines[0] == f"{tmp_path}, line 3: id a occurs a second time (first on line 1)"
    assert lines[-1] == "and 1 more"
    one = Faults()
    one.add(tmp_path, None, "is empty")
    with pytest.raises(EvaluationError, match=f"^{tmp_path}: is empty$"):
        one.check()
