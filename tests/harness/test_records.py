"""Records are written whole, found again, and never lost."""

import json

import pytest

from harness import records
from harness.errors import InputError
from harness.records import Records, finite, key_of


def test_a_record_comes_back(tmp_path):
    store = Records(tmp_path)
    store.save({"key": "abc", "status": "ok", "psnr_db": 21.5, "psnr_frames": [1.0, None]})
    assert store.load("abc")["psnr_db"] == 21.5
    assert store.load("other") is None
    assert len(records.load(tmp_path)) == 1


def test_the_key_changes_with_anything_and_not_with_order():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 1.5})


@pytest.mark.parametrize("content", [b'{"key": "abc", "sta', b"\xff\xfe", b'{"key": "another"}', b"[1]"])
def test_a_damaged_or_foreign_record_is_named_and_set_aside(tmp_path, capsys, content):
    store = Records(tmp_path)
    store.save({"key": "good"})
    (store.folder / "abc.json").write_bytes(content)
    assert [r["key"] for r in store.all()] == ["good"]
    assert "abc.json" in capsys.readouterr().err
    assert (store.folder / "abc.damaged").read_bytes() == content
    assert store.load("abc") is None


def test_a_failed_write_leaves_the_old_record_and_no_part(tmp_path):
    store = Records(tmp_path)
    store.save({"key": "abc", "n": 1})
    with pytest.raises(ValueError, match="Out of range"):
        store.save({"key": "abc", "n": float("inf")})
    assert store.load("abc") == {"key": "abc", "n": 1}
    assert [p.name for p in store.folder.iterdir()] == ["abc.json"]


def test_numbers_that_are_not_numbers_become_none():
    assert finite(float("nan")) is None and finite([1.0, float("inf")]) == [1.0, None] and finite(2.0) == 2.0
    json.dumps(finite([float("-inf")]), allow_nan=False)


def test_no_records_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="harness sweep"):
        records.load(tmp_path)


def test_an_unwritable_place_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out="):
        Records(tmp_path / "file").check_writable()


def test_an_archive_holds_the_same_records(tmp_path):
    store = Records(tmp_path / "from")
    for key in ("b", "a"):
        store.save({"key": key, "psnr_db": 1.5, "created": key})
    packed = records.archive(tmp_path / "from", tmp_path / "to")
    first = packed.read_bytes()
    assert records.archive(tmp_path / "from", tmp_path / "to").read_bytes() == first
    assert sorted(records.load(tmp_path / "to")["key"]) == ["a", "b"]
