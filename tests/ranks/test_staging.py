"""Staging with real ranks: one copies, all read the copy, nobody's death leaves one behind for good."""

import os
import shutil
import signal
import time

import pytest
import torch.distributed as dist

from llamagen_dist.config import ShardAccess
from llamagen_dist.data import cache, fetch
from llamagen_dist.data.manifest import MANIFEST, read_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.writer import shard_name
from llamagen_dist.errors import UserError
from tests.ranks.forked import run_ranks
from tests.shard_server import served
from tests.unit.test_shards import payload, write_set

COUNT = 13


def copies(parent):
    return sorted(path.name for path in parent.glob("llamagen-stage-*/*") if path.is_dir())


def staged_read(location, parent):
    """What a rank sees: its samples, the folder it reads, and whether the copy outlives the first rank to end."""
    shards = open_shards(location, "images", ShardAccess(stage=parent))
    seen, folder = [shards.read(n, ".png") for n in range(COUNT)], shards.folder
    dist.barrier()
    if dist.get_rank() == 0:
        del shards
        kept = folder.exists()
        dist.barrier()
        return seen, str(folder), kept
    dist.barrier()
    del shards
    return seen, str(folder), folder.exists()


def test_two_ranks_share_one_copy_and_the_last_removes_it(tmp_path):
    write_set(tmp_path / "made")
    (tmp_path / "local").mkdir()
    with served(tmp_path / "made") as server:
        (seen, folder, kept), (also, same, left) = run_ranks(staged_read, 2, server.url, tmp_path / "local")
        fetched = [server.times(shard_name(number)) for number in range(3)]
    assert seen == also == [payload(n) for n in range(COUNT)]
    assert folder == same
    assert folder.startswith(str(tmp_path / "local"))
    assert (kept, left) == (True, False)
    assert fetched == [1, 1, 1]


def test_a_killed_users_copy_is_removed_by_the_next_one_and_a_living_users_is_not(tmp_path):
    for name, seed in (("first", 0), ("second", 1)):
        write_set(tmp_path / name, data=lambda n, seed=seed: payload(n, seed))
    access = ShardAccess(stage=tmp_path / "local")
    ready, wait = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = open_shards(tmp_path / "first", access=access)
        os.write(wait, b"x")
        time.sleep(60)
        os._exit(len(held))
    os.read(ready, 1)
    second = open_shards(tmp_path / "second", access=access)
    assert len(copies(tmp_path / "local")) == 2  # the first one lives
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    del second
    assert copies(tmp_path / "local") == []


def test_a_copy_cut_off_in_the_middle_is_made_anew(tmp_path, monkeypatch):
    write_set(tmp_path / "made")
    pid = os.fork()
    if pid == 0:
        cache.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        open_shards(tmp_path / "made", access=ShardAccess(stage=tmp_path / "local"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    sha256 = read_manifest(tmp_path / "made").shards[1].sha256
    torn = next((tmp_path / "local").glob(f"llamagen-stage-*/*/{sha256}"))
    assert not (torn.parent / MANIFEST).exists()
    torn.write_bytes(b"torn")
    shards = open_shards(tmp_path / "made", access=ShardAccess(stage=tmp_path / "local"))
    assert [shards.read(n, ".png") for n in range(COUNT)] == [payload(n) for n in range(COUNT)]


def test_a_forked_worker_that_ends_does_not_take_the_copy_along(tmp_path):
    write_set(tmp_path / "made")
    shards = open_shards(tmp_path / "made", access=ShardAccess(stage=tmp_path / "local"))
    pid = os.fork()
    if pid == 0:
        shards = None  # what the end of a worker does to its copy of the object
        os._exit(0)
    os.waitpid(pid, 0)
    assert shards.folder.exists()
    del shards
    assert copies(tmp_path / "local") == []


def test_a_damaged_byte_is_not_staged_and_the_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    write_set(tmp_path / "made")
    path = tmp_path / "made" / shard_name(2)
    good = path.read_bytes()
    place = good.index(payload(8))
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    access = ShardAccess(stage=tmp_path / "local")
    with pytest.raises(UserError, match=rf"{shard_name(2)}: .*sha256 .*, but {MANIFEST} records"):
        open_shards(tmp_path / "made", access=access)
    assert copies(tmp_path / "local") == []
    path.write_bytes(good)
    assert open_shards(tmp_path / "made", access=access).read(8, ".png") == payload(8)


def test_free_space_is_looked_at_before_anything_is_copied(tmp_path, monkeypatch):
    write_set(tmp_path / "made")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"data\.stage: .*GB free, but .*made needs .*GB"):
        open_shards(tmp_path / "made", access=ShardAccess(stage=tmp_path / "local"))
    assert copies(tmp_path / "local") == []
