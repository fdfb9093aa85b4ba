"""The next window's shards come into the cache while those of the present one are read."""

import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.config import ShardAccess
from llamagen_dist.data.manifest import MANIFEST, Manifest, write_manifest
from llamagen_dist.data.order import Windows
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream, codes_bytes
from llamagen_dist.data.writer import shard_name, write_shard
from llamagen_dist.parallel.topology import Topology
from tests.shard_server import served


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    width=st.integers(1, 9),
    position=st.integers(0, 300),
)
def test_a_window_says_where_its_samples_lie(sizes, width, position):
    windows = Windows(np.array(sizes, np.int64), width, seed=3)
    shards, first, end = windows.window(position)
    assert first <= position < end
    places = windows.samples(torch.arange(first, end)).numpy()
    found = np.searchsorted(np.cumsum(sizes), places, side="right")
    assert sorted(np.repeat(shards, [sizes[shard] for shard in shards])) == sorted(found)
    assert windows.window(end)[1] == end


def access(tmp_path, **keys):
    return ShardAccess(cache=tmp_path / "cache", **keys)


def token_set(folder, shards=4, records=6):
    folder.mkdir()
    members = (".cls", ".codes.npy")
    made = []
    for shard in range(shards):
        codes = [np.full((1, 4), 10 * shard + n, np.uint16) for n in range(records)]
        samples = [(f"{shard:04d}{n:04d}", {".cls": b"1", ".codes.npy": codes_bytes(c)}) for n, c in enumerate(codes)]
        made.append(write_shard(folder, shard_name(shard), samples, members))
    write_manifest(
        folder,
        Manifest(
            "tokens",
            shards * records,
            members,
            tuple(made),
            ["a", "b"],
            tokenizer_sha256="0",
            vocab_size=64,
            grid=(2, 2),
            crops=1,
        ),
    )
    return folder


def fetched_after_one_batch(server, access, **keys):
    stream = TokenStream(open_shards(server.url, "tokens", access), Topology(), 2, 0, 0.0, **keys)
    batch = stream.batch(0)
    read = {int(code) // 10 for code in batch.tokens[:, 0]}
    deadline = time.monotonic() + 5
    while len(got := {name for name, _ in server.requests} - {MANIFEST}) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        if not keys:
            break
    return read, {int(name[6:12]) for name in got}, stream


def test_the_next_window_is_fetched_while_this_one_is_read(tmp_path):
    with served(token_set(tmp_path / "made")) as server:
        read, got, stream = fetched_after_one_batch(server, access(tmp_path), window_shards=1)
        assert len(read) == 1
        assert read < got
        assert len(got) == 2
        following = {int(code) // 10 for code in stream.batch(6).tokens[:, 0]}
        assert following == got - read
        seen = [int(code) for start in range(0, 24, 2) for code in stream.batch(start).tokens[:, 0]]
        assert sorted(seen) == sorted(10 * shard + n for shard in range(4) for n in range(6))


def test_nothing_is_fetched_ahead_without_windows_or_room_for_two(tmp_path):
    with served(token_set(tmp_path / "made")) as server:
        read, got, _ = fetched_after_one_batch(server, access(tmp_path))
        assert got == read
        size = (server.folder / shard_name(0)).stat().st_size
        server.requests.clear()
        narrow = ShardAccess(cache=tmp_path / "narrow", cache_gb=1.5 * size / 1e9)
        stream = TokenStream(open_shards(server.url, access=narrow), Topology(), 2, 0, 0.0, window_shards=1)
        stream.batch(0)
        time.sleep(0.1)
        assert len({name for name, _ in server.requests} - {MANIFEST}) == 1
