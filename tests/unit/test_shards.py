"""Shards: what is written is read, by us and by WebDataset; every damage is found and named."""

import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.cli import main
from llamagen_dist.data.foreign import index_folder, verify
from llamagen_dist.data.index import scan
from llamagen_dist.data.manifest import Manifest, read_manifest, write_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.writer import ShardJob, shard_name, write_shard
from llamagen_dist.errors import UserError

MEMBERS = (".cls", ".png")


def payload(number: int, seed: int = 0) -> bytes:
    return np.random.default_rng([seed, number]).bytes(1 + number * 37 % 900)


def write_set(folder, sizes=(5, 1, 7), members=MEMBERS, data=payload):
    folder.mkdir(parents=True, exist_ok=True)
    records, first = [], 0
    for number, size in enumerate(sizes):
        samples = [(f"{n:09d}", {".png": data(n), ".cls": b"%02d" % (n % 11)}) for n in range(first, first + size)]
        records.append(write_shard(folder, shard_name(number), samples, members))
        first += size
    classes = [f"class {n}" for n in range(11)]
    manifest = Manifest("images", first, members, tuple(records), classes, source={"made_by": "test"})
    write_manifest(folder, manifest)
    return manifest


def test_what_is_written_is_read_by_global_number(tmp_path):
    manifest = write_set(tmp_path)
    shards = open_shards(tmp_path)
    assert shards.manifest == manifest
    assert len(shards) == 13
    for number in (12, 0, 5, 4, 6, 12):
        assert shards.read(number, ".png") == payload(number)
    assert shards.labels(range(13)).tolist() == [n % 11 for n in range(13)]
    assert shards.where(6).endswith("shard-000002.tar: sample 0")
    with pytest.raises(IndexError):
        shards.read(13, ".png")
    with pytest.raises(UserError, match=r"shard-000001.tar: sample 0 has no .txt"):
        shards.read(5, ".txt")


def test_records_of_equal_length_need_no_index(tmp_path):
    manifest = write_set(tmp_path, data=lambda n: bytes([n]) * 600)
    assert all(record.layout is not None for record in manifest.shards)
    assert not list(tmp_path.glob("*.npy"))
    shards = open_shards(tmp_path)
    assert [shards.read(n, ".png")[0] for n in range(13)] == list(range(13))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), seed=st.integers(0, 9))
def test_round_trip_of_any_shard_sizes(tmp_path_factory, sizes, seed):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, sizes, data=lambda n: payload(n, seed))
    shards = open_shards(folder)
    assert [shards.read(n, ".png") for n in range(sum(sizes))] == [payload(n, seed) for n in range(sum(sizes))]


def test_webdataset_reads_the_same_samples(tmp_path):
    write_set(tmp_path)
    shards = open_shards(tmp_path)
    url = str(tmp_path / "shard-{000000..000002}.tar")
    stream = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [s["__key__"] for s in stream] == [f"{n:09d}" for n in range(13)]
    assert [s["png"] for s in stream] == [shards.read(n, ".png") for n in range(13)]
    decoded = [s["cls"] for s in webdataset.WebDataset(url, shardshuffle=False).decode(only=["cls"])]
    assert decoded == shards.labels(range(13)).tolist()
    assert decoded != np.roll(decoded, 1).tolist()


def test_two_writes_give_identical_bytes_without_time_or_user(tmp_path):
    write_set(tmp_path / "a")
    write_set(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    with tarfile.open(tmp_path / "a" / shard_name(0)) as tar:
        assert {(t.mtime, t.uid, t.gid, t.uname, t.gname, t.mode) for t in tar} == {(0, 0, 0, "", "", 0o444)}


@pytest.mark.parametrize("change", [-1, 1])
def test_one_byte_too_few_or_too_many_is_named_with_the_sha256(tmp_path, change):
    record = write_set(tmp_path).shards[1]
    path = tmp_path / record.name
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"\0")
    with pytest.raises(UserError) as refusal:
        open_shards(tmp_path)
    for part in (record.name, str(record.bytes), str(record.bytes + change), record.sha256):
        assert part in str(refusal.value)
    path.write_bytes(data)
    open_shards(tmp_path)


def test_a_flipped_byte_is_found_by_verify_with_both_hashes(tmp_path):
    record = write_set(tmp_path).shards[2]
    verify(open_shards(tmp_path))
    path = tmp_path / record.name
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as refusal:
        verify(open_shards(tmp_path))
    for part in (record.name, record.sha256, hashlib.sha256(data).hexdigest(), "its bytes have changed"):
        assert part in str(refusal.value)
    assert "shard-000000" not in str(refusal.value)


def test_a_flipped_byte_in_an_index_is_found(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "shard-000000.index.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000000.index.npy: sha256"):
        verify(open_shards(tmp_path))
    index_folder(tmp_path)  # makes the indexes again
    verify(open_shards(tmp_path))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="the folder does not exist"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"manifest.json is missing.*llamagen pack"):
        open_shards(tmp_path)
    write_set(tmp_path)
    (tmp_path / shard_name(1)).unlink()
    with pytest.raises(UserError, match=r"shard-000001.tar: No such file.*copy it here again"):
        open_shards(tmp_path)
    write_set(tmp_path / "again")
    with pytest.raises(UserError, match="holds images, but tokens are needed"):
        open_shards(tmp_path / "again", "tokens")


def test_a_manifest_cannot_point_outside_or_lie_about_itself(tmp_path):
    write_set(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    good = json.loads(path.read_text())

    def refuse(change, match):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=match):
            open_shards(tmp_path / "set")

    refuse(lambda d: d["shards"][0].update(name="../secret.tar"), "not a plain file name")
    refuse(lambda d: d["shards"][0].update(name="/etc/passwd"), "not a plain file name")
    refuse(lambda d: d.update(count=14), "not the sum")
    refuse(lambda d: d.update(format=99), "format 99")
    refuse(lambda d: d.pop("shards"), "the key 'shards' is missing")
    refuse(lambda d: d["shards"][0].update(bytes="many"), "not a shard manifest")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "set")


def foreign_tar(path, entries):
    """A tar of another tool. entries: (name, bytes), or (name, None, type) for folder, link or device."""
    with tarfile.open(path, "w") as tar:
        for name, data, *kind in entries:
            info = tarfile.TarInfo(name)
            if kind:
                info.type, info.linkname = kind[0], "elsewhere"
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))


def test_foreign_tars_are_indexed_by_webdatasets_rules(tmp_path):
    entries = [
        ("./", None, tarfile.DIRTYPE),
        ("./n01/x_1.JPG", b"one"),
        ("./n01/x_1.cls", b"3"),
        ("./n01/README", b"ignored"),
        ("./n01/x_2.seg.png", b"mask"),
        ("./n01/x_2.png", b"two"),
        ("./n01/x_2.cls", b"0"),
        ("__meta__/x.json", b"{}"),
    ]
    foreign_tar(tmp_path / "b.tar", entries)
    foreign_tar(tmp_path / "a.tar", [("k.cls", b"1\n"), ("k.jpg", b"zero")])
    manifest = index_folder(tmp_path)
    shards = open_shards(tmp_path)
    assert manifest.members == (".cls", ".jpg", ".png", ".seg.png")
    assert [shards.image_bytes(n) for n in range(3)] == [b"zero", b"one", b"two"]
    assert shards.labels(range(3)).tolist() == [1, 3, 0]
    assert manifest.classes == ["0", "1", "2", "3"]
    assert shards.parts(0) == (".cls", ".jpg")
    stream = list(webdataset.WebDataset(str(tmp_path / "{a,b}.tar"), shardshuffle=False))
    assert [s.get("png", s.get("jpg")) for s in stream] == [shards.image_bytes(n) for n in range(3)]
    verify(shards)


@pytest.mark.parametrize(
    "entry",
    [
        ("../evil.png", b"x"),
        ("/etc/evil.png", b"x"),
        ("a/../../evil.png", b"x"),
        ("a.png", None, tarfile.SYMTYPE),
        ("a.png", None, tarfile.LNKTYPE),
        ("a.png", None, tarfile.CHRTYPE),
    ],
)
def test_names_that_escape_and_links_are_refused(tmp_path, entry):
    foreign_tar(tmp_path / "x.tar", [("fine.png", b"ok"), entry])
    with pytest.raises(UserError, match=r"x.tar: the member .* the shard is refused"):
        index_folder(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    foreign_tar(tmp_path / "x.tar", [("fine.png", b"ok"), ("also.png", b"x")])
    assert index_folder(tmp_path).count == 2


def pieces(folder, first=0, record=tarfile.RECORDSIZE):
    """Three tars of four samples each, as tools write them (filled up to whole records) or without filling."""
    folder.mkdir(exist_ok=True)
    parts = []
    for k in range(3):
        numbers = range(first + 4 * k, first + 4 * k + 4)
        foreign_tar(
            folder / "piece",
            [(f"{n:03d}{e}", d) for n in numbers for e, d in ((".png", payload(n)), (".cls", b"%d" % (n % 3)))],
        )
        data = (folder / "piece").read_bytes().rstrip(b"\0")
        parts.append(data + bytes(-len(data) % 512 + 1024))
        parts[-1] += bytes(-len(parts[-1]) % record)
    (folder / "piece").unlink()
    return parts


@pytest.mark.parametrize("record", [tarfile.RECORDSIZE, 512])
@pytest.mark.parametrize("between", [b"", bytes(512), bytes(3 << 20)])
def test_tars_joined_by_cat_are_read_whole(tmp_path, between, record, capsys):
    folder = tmp_path / "set"
    parts = pieces(folder, record=record)
    (folder / "x.tar").write_bytes(between.join(parts))
    main(["shards", "index", str(folder)])
    assert "1 shards, 12 samples indexed" in capsys.readouterr().out
    shards = open_shards(folder)
    assert [shards.read(n, ".png") for n in range(12)] == [payload(n) for n in range(12)]
    assert shards.labels(range(12)).tolist() == [n % 3 for n in range(12)]
    (folder / "x.index.npy").unlink()
    assert open_shards(folder).read(11, ".png") == payload(11)  # made again on reading
    listed = subprocess.run(["tar", "-tif", folder / "x.tar"], capture_output=True, text=True, check=True).stdout
    assert listed.split() == [f"{n:03d}{end}" for n in range(12) for end in (".png", ".cls")]
    (folder / "y.tar").write_bytes(parts[0][:4096])  # sabotage twin: one of them is cut
    with pytest.raises(UserError, match=r"y\.tar: cut short"):
        scan(folder / "y.tar")


def test_what_stands_between_joined_tars_is_read_or_refused(tmp_path):
    first, second, third = pieces(tmp_path)
    path = tmp_path / "x.tar"
    damaged = bytearray(second)
    damaged[0] ^= 1  # the first header of the second tar
    for data in (damaged + third, b"x" * 512 + second + third, second + bytes(1024) + b"junk" * 5000):
        path.write_bytes(first + data)
        with pytest.raises(UserError, match=r"x\.tar: after the end of a tar, at byte \d+ of \d+, stands something"):
            scan(path)
    path.write_bytes(first + second[:1024])
    with pytest.raises(UserError, match=r"x\.tar: cut short"):
        scan(path)
    path.write_bytes(first[:-512] + b"what a tape had in its buffer".ljust(512))  # the last record's filling
    assert len(scan(path).spans) == 4
    path.write_bytes(first + first)
    with pytest.raises(UserError, match="the key '000' comes twice"):
        scan(path)


def test_a_manifest_of_the_first_tar_alone_is_not_indexed_again(tmp_path):
    first, second, _ = pieces(tmp_path)
    (tmp_path / "x.tar").write_bytes(first)
    manifest = index_folder(tmp_path)
    (tmp_path / "x.tar").write_bytes(first + second)  # and what an earlier version recorded of it:
    whole = hashlib.sha256(first + second).hexdigest()
    record = dataclasses.replace(manifest.shards[0], bytes=len(first + second), sha256=whole)
    write_manifest(tmp_path, dataclasses.replace(manifest, shards=(record,)))
    with pytest.raises(UserError, match=r"x.tar: holds 8 samples, but manifest.json records 4; delete manifest.json"):
        index_folder(tmp_path)


def test_hidden_files_in_a_tar_are_passed_over_and_counted(tmp_path, capsys):
    apple = [("./._000.png", b"\0\5\x16\7"), ("._000.cls", b"\0\5\x16\7"), ("README", b"no ending")]
    foreign_tar(tmp_path / "x.tar", [("000.png", b"x"), *apple, ("001.png", b"y")])
    main(["shards", "index", str(tmp_path)])
    assert "3 files passed over: hidden ones" in capsys.readouterr().out
    shards = open_shards(tmp_path)
    assert shards.manifest.noticed == {"ignored_files": 3}
    assert [shards.image_bytes(n) for n in range(len(shards))] == [b"x", b"y"]
    foreign_tar(tmp_path / "x.tar", [("000.png", b"x"), ("001.png", b"y")])  # sabotage twin
    (tmp_path / "manifest.json").unlink()
    assert index_folder(tmp_path).noticed == {}


def test_tars_that_cannot_be_read_in_the_middle_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match="not a complete uncompressed tar"):
        index_folder(tmp_path)
    foreign_tar(path, [("a.png", b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cut short inside 'a.png'"):
        scan(path)
    foreign_tar(path, [("a.png", b"x"), ("a.png", b"y")])
    with pytest.raises(UserError, match=r"has .png twice"):
        scan(path)
    foreign_tar(path, [("a.png", b"x"), ("a.cls", b"cat")])
    with pytest.raises(UserError, match="label b'cat' is not"):
        index_folder(tmp_path)
    foreign_tar(path, [("a.png", b"x"), ("a.cls", b"5")])
    with pytest.raises(UserError, match="not one of the 2 classes"):
        index_folder(tmp_path, ["cat", "dog"])


def test_a_job_keeps_finished_shards_and_refuses_other_contents(tmp_path):
    samples = [("000000000", {".png": b"x"})]
    job = ShardJob(tmp_path, {"a": 1, "grid": (2, 2)})
    job.begin()
    job.write(shard_name(0), samples, (".png",), {"skipped": ["y"]})
    again = ShardJob(tmp_path, {"a": 1, "grid": (2, 2)})
    again.begin()
    found = again.finished(shard_name(0))
    assert found is not None
    assert found[1] == {"skipped": ["y"]}
    assert again.finished(shard_name(1)) is None
    with pytest.raises(UserError, match=r"holds unfinished shards made in another way \(a: 1 -> 2"):
        ShardJob(tmp_path, {"a": 2}).begin()
    (tmp_path / shard_name(0)).write_bytes(b"torn")
    assert again.finished(shard_name(0)) is None  # it will be written again
    record = again.write(shard_name(0), samples, (".png",))
    again.finish(Manifest("images", 1, (".png",), (record,), source=again.source))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "shard-000000.tar",
    ]
    assert again.completed() is not None
    with pytest.raises(UserError, match=r"made in another way \(a: 1 -> 2; grid: \[2, 2\] -> null\)"):
        ShardJob(tmp_path, {"a": 2}).completed()
