"""Keys, and what each caller may have under way."""

from __future__ import annotations

import hmac
from contextlib import suppress
from pathlib import Path

import pytest

from flamingo_export.errors import InputError
from flamingo_export.serve.access import Access, read_keys
from flamingo_export.serve.refusals import ApiError

KEY, OTHER = "a" * 16, "b" * 20


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nann {KEY}\n{OTHER}\n", encoding="utf-8")
    assert read_keys(file) == {"ann": KEY, "key 4": OTHER}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("short", "at least 16"),
        (f"a b {KEY}", "line 1"),
        (f"ann {KEY}\nann {OTHER}", "line 2"),
        (f"ann {KEY}\nbob {KEY}", "line 2"),
        ("# nobody\n", "no keys"),
    ],
)
def test_a_file_that_cannot_be_meant(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        read_keys(tmp_path / "keys")
    assert KEY not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_callers_by_key() -> None:
    access = Access({"ann": KEY, "bob": OTHER}, None)
    assert access.caller(f"Bearer {KEY}", "1.2.3.4") == "ann"
    assert access.caller(f"bearer  {OTHER} ", "1.2.3.4") == "bob"
    for header, code in (
        (None, "missing_api_key"),
        (KEY, "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        ("Bearer x", "invalid_api_key"),
        (f"Bearer {KEY}x", "invalid_api_key"),
        ("Bearer \udcff", "invalid_api_key"),
    ):
        with pytest.raises(ApiError) as caught:
            access.caller(header, "1.2.3.4")
        assert (caught.value.status, caught.value.code) == (401, code)
        assert caught.value.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_is_compared_with_every_key_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where one fits nor how much of it fits shows in the time: digests of one length, all of them."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr("hmac.compare_digest", noted)
    access = Access({"ann": KEY, "bob": OTHER}, None)
    for key in (KEY, OTHER, "x"):
        compared.clear()
        with suppress(ApiError):
            access.caller(f"Bearer {key}", "1.2.3.4")
        assert compared == [(32, 32)] * 2


def test_without_keys_callers_are_addresses() -> None:
    assert Access({}, None).caller(None, "1.2.3.4") == "1.2.3.4"


def test_a_caller_with_too_much_under_way() -> None:
    access = Access({}, 1)
    with access.turn("a"):
        with pytest.raises(ApiError) as caught, access.turn("a"):
            pass
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
        with access.turn("b"):
            pass
    with access.turn("a"):
        pass
