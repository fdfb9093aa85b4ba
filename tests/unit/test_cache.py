"""The cache: bounded, shared, filled once, and nothing in it that was not checked."""

import hashlib
import os
import threading
import time

import pytest

from llamagen_dist.data.cache import NodeCache
from llamagen_dist.data.fetch import LocalSource
from llamagen_dist.errors import UserError


def cache_in(folder, limit):
    return NodeCache(LocalSource(folder), (), folder, limit)


def blob(number, size=1000):
    data = bytes([number]) * size
    return hashlib.sha256(data).hexdigest(), data


def put(cache, number, size=1000):
    sha256, data = blob(number, size)
    filled = []

    def fill(file):
        filled.append(number)
        file.write(data)

    with cache.open(sha256, size, fill) as file:
        assert file.read() == data
    return bool(filled)


def test_the_cache_stays_within_its_limit_and_drops_what_was_unused_longest(tmp_path):
    cache = cache_in(tmp_path, 3500)
    assert [put(cache, number) for number in (1, 2, 3)] == [True] * 3
    for age, number in enumerate((3, 2, 1)):
        os.utime(tmp_path / blob(number)[0], (age, age))
    assert put(cache, 3) is False  # used: now the newest
    assert put(cache, 4) is True
    assert {number for number in (1, 2, 3, 4) if (tmp_path / blob(number)[0]).exists()} == {1, 3, 4}
    with pytest.raises(UserError, match=r"data\.cache_gb: a shard of 4e-06 GB does not fit"):
        put(cache, 5, 4000)
    with pytest.raises(UserError, match="is not one"):
        cache.open("../../etc/passwd", 1, lambda file: None)


def test_threads_fetch_a_file_once(tmp_path):
    cache, began, filled = cache_in(tmp_path, 10000), threading.Barrier(4), []
    sha256, data = blob(7)

    def fill(file):
        filled.append(1)
        time.sleep(0.05)
        file.write(data)

    def use():
        began.wait()
        with cache.open(sha256, 1000, fill) as file:
            assert file.read() == data
            filled.append("read")

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (filled.count(1), filled.count("read")) == (1, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([sha256, "lock"])


def test_another_users_folder_is_not_trusted(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match=r"data\.cache: .*belongs to another user"):
        cache_in(tmp_path / "link", 10)
