"""Shards from elsewhere: the samples of the folder itself, whatever goes wrong on the way, or one sentence."""

import hashlib
import io
import os
import re
import shutil
import time

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamagen_dist.cli import main
from llamagen_dist.config import ShardAccess, load
from llamagen_dist.data import cache, fetch
from llamagen_dist.data.fetch import source_at
from llamagen_dist.data.index import index_limit, index_name
from llamagen_dist.data.manifest import MANIFEST
from llamagen_dist.data.shards import manifest_of, open_shards
from llamagen_dist.data.writer import shard_name
from llamagen_dist.errors import UserError
from tests.shard_server import served
from tests.unit.test_shards import payload, write_set

COUNT = 13
FIRST = shard_name(0)


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server(tmp_path):
    write_set(tmp_path / "made")
    with served(tmp_path / "made") as state:
        yield state


def access(tmp_path, **keys):
    return ShardAccess(cache=tmp_path / "cache", **keys)


def all_samples(shards):
    return [shards.read(n, ".png") for n in range(len(shards))]


def expected():
    return [payload(n) for n in range(COUNT)]


def size_of(server, number=0):
    return os.path.getsize(server.folder / shard_name(number))


def test_a_web_server_gives_the_samples_of_the_folder_and_the_cache_keeps_them(tmp_path, server):
    shards = open_shards(server.url, "images", access(tmp_path))
    assert all_samples(shards) == expected()
    assert all_samples(shards) != expected()[::-1]
    assert shards.labels(range(COUNT)).tolist() == [n % 11 for n in range(COUNT)]
    assert shards.manifest.fingerprint() == open_shards(server.folder).manifest.fingerprint()
    assert shards.where(5) == f"{server.url}/{shard_name(1)}: sample 0"
    asked = len(server.requests)
    again = open_shards(server.url, "images", access(tmp_path))
    assert all_samples(again) == expected()
    assert [name for name, _ in server.requests[asked:]] == [MANIFEST]


def test_two_503_and_a_429_are_waited_for(tmp_path, server):
    server.faults[FIRST] = [503, 503, 429]
    server.faults[MANIFEST] = [500]
    assert all_samples(open_shards(server.url, access=access(tmp_path))) == expected()
    assert server.times(FIRST) == 4


def test_a_cut_line_is_taken_up_where_it_was_cut(tmp_path, server):
    server.faults[FIRST] = [("cut", 700), ("cut", 300)]
    assert all_samples(open_shards(server.url, access=access(tmp_path))) == expected()
    assert [ranged for name, ranged in server.requests if name == FIRST] == ["", "bytes=700-", "bytes=1000-"]


def test_a_server_without_ranges_starts_over(tmp_path, server):
    server.faults[FIRST] = [("cut", 700), "no ranges"]
    assert all_samples(open_shards(server.url, access=access(tmp_path))) == expected()


def test_a_byte_flipped_on_the_way_is_noticed_and_fetched_again(tmp_path, server):
    server.faults[FIRST] = [("flip", 600), ("cut", 700), ("flip", 900)]  # the last one spoils what was resumed
    assert all_samples(open_shards(server.url, access=access(tmp_path))) == expected()
    assert server.times(FIRST) == 4


def test_a_byte_flipped_at_the_source_names_url_hashes_and_tries(tmp_path, server):
    path = server.folder / shard_name(2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    shards = open_shards(server.url, access=access(tmp_path))
    assert shards.read(5, ".png") == payload(5)
    with pytest.raises(UserError) as refusal:
        shards.read(12, ".png")
    for part in (
        f"{server.url}/{shard_name(2)}",
        "5 tries",
        shards.manifest.shards[2].sha256,
    ):
        assert part in str(refusal.value)
    assert hashlib.sha256(data).hexdigest() in str(refusal.value)
    assert not (tmp_path / "cache" / shards.manifest.shards[2].sha256).exists()


@pytest.mark.parametrize(
    ("fault", "tries", "words"),
    [
        (404, 1, r"cannot be fetched \(HTTP 404"),
        (403, 1, r"cannot be fetched \(HTTP 403"),
        (503, 5, r"5 tries over 0 s \(HTTP 503"),
        (("cut", 10), 5, r"ended after 50 of the [\d,]+ bytes"),
        (("long", 1), 5, r"longer than [\d,]+ bytes"),
    ],
)
def test_what_stays_wrong_is_one_sentence_after_bounded_tries(tmp_path, server, fault, tries, words):
    server.always[FIRST] = fault
    shards = open_shards(server.url, access=access(tmp_path))
    with pytest.raises(UserError, match=words) as refusal:
        shards.read(0, ".png")
    assert f"{server.url}/{FIRST}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert server.times(FIRST) == tries
    del server.always[FIRST]
    assert shards.read(0, ".png") == payload(0)  # the same object goes on when the source does


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(
        st.one_of(
            st.sampled_from([500, 503, 429, "no ranges"]),
            st.tuples(st.just("cut"), st.integers(0, 3000)),
            st.tuples(st.sampled_from(["flip", "long"]), st.integers(1, 1000)),
        ),
        max_size=4,
    )
)
def test_any_four_faults_are_overcome(tmp_path_factory, faults):
    folder = tmp_path_factory.mktemp("any")
    write_set(folder / "made", sizes=(5,))
    with served(folder / "made") as server:
        server.faults[FIRST] = list(faults)
        shards = open_shards(server.url, access=access(folder))
        assert all_samples(shards) == expected()[:5]
        assert hashlib.sha256((folder / "made" / FIRST).read_bytes()).hexdigest() in os.listdir(folder / "cache")


def test_nobody_answers(tmp_path):
    with pytest.raises(UserError, match=r"127.0.0.1:9/x/manifest.json: could not be fetched in 5 tries.*refused"):
        open_shards("http://127.0.0.1:9/x", access=access(tmp_path))


def test_what_a_remote_folder_lacks(tmp_path, server):
    with pytest.raises(UserError, match=r"set data\.cache .* or data\.stage"):
        open_shards(server.url)
    with pytest.raises(UserError, match="holds images, but tokens are needed"):
        open_shards(server.url, "tokens", access(tmp_path))
    (server.folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"no shards here \(manifest.json is missing\)"):
        open_shards(server.url, access=access(tmp_path))


def test_a_missing_index_is_made_again_in_the_cache_with_a_notice(tmp_path, server, capsys):
    (server.folder / "shard-000000.index.npy").unlink()
    for _ in range(2):
        assert all_samples(open_shards(server.url, access=access(tmp_path))) == expected()
    assert capsys.readouterr().out.count("is missing and was made again") == 1


def test_secrets_in_a_url_reach_the_server_but_no_message(tmp_path, server):
    shards = open_shards(f"{server.url}?sig=tell-nobody", access=access(tmp_path))
    assert all_samples(shards) == expected()
    server.always[FIRST] = 404
    shards.close()
    shutil.rmtree(tmp_path / "cache")  # tidied away in the middle of a run
    assert shards.read(12, ".png") == payload(12)
    with pytest.raises(UserError) as refusal:
        shards.read(0, ".png")
    assert "tell-nobody" not in str(refusal.value) + shards.where(0)
    with pytest.raises(UserError, match="password in a URL") as refusal:
        open_shards("https://me:hunter2@host/x", access=access(tmp_path))
    assert "hunter2" not in str(refusal.value)


def test_an_object_store_through_fsspec(tmp_path):
    write_set(tmp_path / "made")
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path / 'made'}/", "/bucket/shards/", recursive=True)
    shards = open_shards("memory://bucket/shards", access=access(tmp_path))
    assert all_samples(shards) == expected()
    with pytest.raises(UserError, match=r"memory://bucket/none: no shards here"):
        open_shards("memory://bucket/none", access=access(tmp_path))
    with pytest.raises(UserError, match=r"nonsense://x: cannot be reached"):
        open_shards("nonsense://x", access=access(tmp_path))


def test_a_command_runs_only_with_permission(tmp_path):
    write_set(tmp_path / "made")
    location = f"pipe:cat {tmp_path / 'made'}/{{name}} | cat"
    with pytest.raises(UserError, match=r"allow_pipe=true"):
        open_shards(location, access=access(tmp_path))
    assert not (tmp_path / "cache").exists()
    shards = open_shards(location, access=access(tmp_path, allow_pipe=True))
    assert all_samples(shards) == expected()
    with pytest.raises(UserError, match=r"5 tries.*No such file"):
        manifest_of("pipe:cat /nowhere/{name}", ShardAccess(allow_pipe=True))
    with pytest.raises(UserError, match=r"write \{name\}"):
        manifest_of("pipe:cat /nowhere", ShardAccess(allow_pipe=True))


def test_a_manifest_names_files_and_nothing_to_run(tmp_path, server):
    text = (server.folder / MANIFEST).read_text()
    (server.folder / MANIFEST).write_text(text.replace(FIRST, f"pipe:touch {tmp_path.name};"))
    shards = open_shards(server.url, access=access(tmp_path, allow_pipe=True))
    with pytest.raises(UserError, match=r"pipe%3Atouch.*HTTP 404"):
        shards.read(0, ".png")
    with pytest.raises(UserError, match=r"made/pipe:touch.*No such file"):
        open_shards(server.folder)


def test_file_names_cannot_become_commands(tmp_path):
    way = source_at("pipe:printf %s {name}", True)
    with way.stream("$(touch x); echo 'y", 0) as (_, blocks):
        assert b"".join(blocks) == b"$(touch x); echo 'y"


def test_a_command_that_is_given_up_is_ended_with_its_children(tmp_path):
    way = source_at(f"pipe:(sleep 0.2; touch {tmp_path}/alive) | yes # {{name}}", True)
    with pytest.raises(UserError, match="longer than"):
        way.fetch("x", io.BytesIO(), limit=1000)
    time.sleep(0.3)
    assert not (tmp_path / "alive").exists()


def test_a_url_in_a_config_stays_one(tmp_path):
    (tmp_path / "gpt.yaml").write_text(
        "kind: gpt\nrun_dir: r\nmodel: {size: GPT-B}\ntrain: {images: 256}\n"
        "data: {train: 'https://host/a//b', validation: local/folder}\n"
    )
    data = load(tmp_path / "gpt.yaml").data
    assert (data.train, str(data.validation)) == ("https://host/a//b", "local/folder")
    assert data.validation.is_absolute() is False
    with pytest.raises(UserError, match="cache_gb"):
        load(tmp_path / "gpt.yaml", ["data.cache_gb=0"])


# --- the cache ---


def test_reading_goes_on_from_a_dropped_file_and_through_a_cache_smaller_than_the_set(tmp_path, server):
    largest = max(size_of(server, number) for number in range(3))
    small = access(tmp_path, cache_gb=(largest + 2000) / 1e9)
    shards = open_shards(server.url, access=small)
    for number in (0, 12, 5, 0, 12, 5, 1):
        assert shards.read(number, ".png") == payload(number)
        held = sum(entry.stat().st_size for entry in os.scandir(tmp_path / "cache"))
        assert held <= small.cache_gb * 1e9
    assert server.times(shard_name(2)) > 1
    other = open_shards(server.url, access=small)
    other.read(12, ".png")  # drops the shard that the first one has open
    assert shards.read(1, ".png") == payload(1)


def test_the_next_process_goes_on_where_a_killed_one_stopped(tmp_path, server):
    server.faults[FIRST] = [("cut", 700)]
    pid = os.fork()
    if pid == 0:
        fetch.time.sleep = lambda _: os.kill(os.getpid(), 9)  # in the pause after the cut
        open_shards(server.url, access=access(tmp_path)).read(0, ".png")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert open_shards(server.url, access=access(tmp_path)).read(0, ".png") == payload(0)
    assert [ranged for name, ranged in server.requests if name == FIRST] == ["", "bytes=700-"]
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("synced", [1, 2])
def test_a_download_that_was_whole_when_its_process_died_is_used(tmp_path, server, synced):
    """Killed between the last byte and the new name: of a shard, whose size is known, and of its index."""
    pid = os.fork()
    if pid == 0:
        calls = []
        try:
            cache.os.fsync = lambda _: calls.append(1) or (len(calls) == synced and os.kill(os.getpid(), 9))
            open_shards(server.url, access=access(tmp_path)).read(0, ".png")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    [part] = (tmp_path / "cache").glob("*.part")
    name = [FIRST, index_name(FIRST)][synced - 1]
    assert part.read_bytes() == (server.folder / name).read_bytes()
    server.requests.clear()
    assert open_shards(server.url, access=access(tmp_path)).read(0, ".png") == payload(0)
    asked = [ranged for asked, ranged in server.requests if asked == name]
    assert asked == ([] if synced == 1 else [f"bytes={(server.folder / name).stat().st_size}-"])
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("more", [0, 100])
def test_what_only_looks_like_a_whole_download_is_fetched_from_its_beginning(tmp_path, server, more):
    record = open_shards(server.folder).manifest.shards[0]
    name = index_name(FIRST)
    size = (server.folder / name).stat().st_size
    shards = open_shards(server.url, access=access(tmp_path))
    limit = index_limit(record, shards.manifest.members)
    part = tmp_path / "cache" / f"{record.index_sha256}.{limit}.part"
    part.write_bytes(b"x" * (size + more))
    assert shards.read(0, ".png") == payload(0)
    assert [ranged for asked, ranged in server.requests if asked == name] == [f"bytes={size + more}-", ""]
    server.always[name] = 416  # sabotage twin: a server that has no range at all, not even the whole file
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"index\.npy: cannot be fetched \(HTTP 416"):
        open_shards(server.url, access=access(tmp_path)).read(0, ".png")


# --- the command line ---


def test_remote_shards_are_verified_and_described(tmp_path, server, capsys):
    main(["shards", "verify", server.url])
    assert f"{server.url}: 3 shards, 13 samples, every byte as recorded" in capsys.readouterr().out
    main(["shards", "stats", server.url, "--cache", str(tmp_path / "cache")])
    said = capsys.readouterr().out
    assert "13 in 3 shards" in said
    assert re.search(r"\b0 +2  class 0\n", said)
    server.always[FIRST] = ("flip", 600)
    main(["shards", "verify", server.url, "--cache", str(tmp_path / "cache")])  # what is kept was checked
    with pytest.raises(
        UserError, match=rf"{FIRST}: could not be fetched in 5 tries.*sha256 .*, but {MANIFEST} records"
    ):
        main(["shards", "verify", server.url])
    with pytest.raises(UserError, match="allow-pipe"):
        main(["shards", "verify", f"pipe:cat {server.folder}/{{name}}"])
    main(["shards", "verify", f"pipe:cat {server.folder}/{{name}}", "--allow-pipe"])
    with pytest.raises(UserError, match="--cache-gb -1: give more than 0"):
        main(["shards", "stats", server.url, "--cache-gb", "-1"])
