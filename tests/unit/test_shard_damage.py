"""Shards that change while they are read, lose their index or a bit: named, repaired where that is sure, no crash."""

import dataclasses
import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.data import index
from llamagen_dist.data import shards as shards_module
from llamagen_dist.data.foreign import verify
from llamagen_dist.data.index import index_name
from llamagen_dist.data.manifest import write_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.writer import shard_name
from llamagen_dist.errors import UserError
from tests.unit.test_shards import payload, write_set

FIRST, LAST = shard_name(0), shard_name(2)


def equal_records(number):
    return bytes([number]) * 600


def test_a_shard_cut_short_in_use_is_a_sentence_not_a_bus_error(tmp_path):
    record = write_set(tmp_path).shards[2]
    shards = open_shards(tmp_path)
    assert shards.read(12, ".png") == payload(12)
    os.truncate(tmp_path / LAST, 4096)
    with pytest.raises(UserError, match=rf"{LAST}: ends before byte .* cut short while it was in use") as refusal:
        shards.read(12, ".png")
    assert record.sha256 in str(refusal.value)
    shards.close()
    with pytest.raises(UserError, match=rf"{LAST}: 4096 bytes, but manifest.json records {record.bytes}"):
        shards.read(12, ".png")
    assert shards.read(0, ".png") == payload(0)


def test_a_shard_deleted_in_use_is_read_to_the_end_and_named_once_it_is_needed_again(tmp_path):
    write_set(tmp_path)
    shards = open_shards(tmp_path)
    shards.read(12, ".png")
    (tmp_path / LAST).unlink()
    assert shards.read(6, ".png") == payload(6)
    shards.close()
    with pytest.raises(UserError, match=rf"{LAST}: cannot be read \(No such file or directory\); copy it here again"):
        shards.read(6, ".png")


def test_an_unreadable_disk_is_named(tmp_path):
    write_set(tmp_path)
    shards = open_shards(tmp_path)
    shards.read(12, ".png")
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, shards._open[2].file.fileno())  # reading a folder fails like a disk: an error of the system
    os.close(folder)
    with pytest.raises(UserError, match=rf"{LAST}: cannot be read any more \(Is a directory\)"):
        shards.read(12, ".png")


@pytest.mark.parametrize("damage", ["missing", "flipped", "empty"])
@pytest.mark.parametrize("writable", [True, False])
def test_an_index_is_made_again_with_a_notice(tmp_path, monkeypatch, capsys, damage, writable):
    write_set(tmp_path)
    path = tmp_path / index_name(FIRST)
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else good[:-1] + bytes([good[-1] ^ 1]))
    if not writable:
        monkeypatch.setattr(index, "write_bytes", _read_only)
    shards = open_shards(tmp_path)
    assert [shards.read(n, ".png") for n in range(13)] == [payload(n) for n in range(13)]
    said = capsys.readouterr().out
    assert said.count(f"{path}: ") == said.count("was made again") == 1
    assert ("for this process only" in said) is not writable
    assert (path.exists() and path.read_bytes() == good) is writable
    open_shards(tmp_path).read(0, ".png")
    assert (capsys.readouterr().out == "") is writable


def _read_only(path, data):
    raise OSError(30, "Read-only file system")


def test_an_index_is_not_made_from_a_shard_that_has_changed(tmp_path):
    write_set(tmp_path / "a")
    write_set(tmp_path / "b", data=lambda n: payload(n, 1)[::-1] + b"x")
    (tmp_path / "a" / index_name(FIRST)).unlink()
    size = (tmp_path / "a" / FIRST).stat().st_size
    other = (tmp_path / "b" / FIRST).read_bytes()
    (tmp_path / "a" / FIRST).write_bytes(other.ljust(size, b"\0")[:size])
    with pytest.raises(UserError, match=r"cannot be made again, because shard-000000.tar has changed"):
        open_shards(tmp_path / "a").read(0, ".png")


@settings(max_examples=40)
@given(place=st.integers(min_value=0), records=st.sampled_from([payload, equal_records]))
def test_any_flipped_bit_is_traced_to_its_shard(tmp_path_factory, place, records):
    folder = tmp_path_factory.getbasetemp() / f"flips-{records.__name__}"
    if not folder.exists():
        write_set(folder, data=records)
    shards = open_shards(folder)
    path, kept = folder / LAST, (folder / LAST).read_bytes()
    place %= len(kept)
    try:
        path.write_bytes(kept[:place] + bytes([kept[place] ^ 4]) + kept[place + 1 :])
        with pytest.raises(UserError, match=rf"{LAST}: sha256 .*its bytes have changed") as refusal:
            verify(shards)
        assert FIRST not in str(refusal.value)
    finally:
        path.write_bytes(kept)
    verify(shards)  # nothing is wrong any more


def test_shards_with_checksum_files_of_an_earlier_version_are_read_and_those_ignored(tmp_path):
    write_set(tmp_path)
    for number in range(3):
        (tmp_path / f"{shard_name(number)[:-4]}.crc32").write_bytes(b"whatever")
    shards = open_shards(tmp_path)
    verify(shards)
    assert [shards.read(n, ".png") for n in range(13)] == [payload(n) for n in range(13)]


def test_more_shards_than_are_kept_open_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 4)
    write_set(tmp_path, sizes=(3,) * 5)
    shards = open_shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in (0, 14, 7, 3, 11, 0, 8, 14):
        assert shards.read(number, ".png") == payload(number)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_that_points_outside_its_shard_is_named(tmp_path):
    manifest = write_set(tmp_path)
    path = tmp_path / index_name(FIRST)
    data = bytearray(path.read_bytes())
    data[-8:] = (1 << 40).to_bytes(8, "little")  # the size of the last sample's last member
    path.write_bytes(data)
    record = dataclasses.replace(manifest.shards[0], index_sha256=hashlib.sha256(data).hexdigest())
    write_manifest(tmp_path, dataclasses.replace(manifest, shards=(record, *manifest.shards[1:])))
    shards = open_shards(tmp_path)
    assert shards.read(3, ".png") == payload(3)
    with pytest.raises(UserError, match=rf"{FIRST}: sample 4: .*lies outside its file"):
        shards.read(4, ".png")
