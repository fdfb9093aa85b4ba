"""Whether shards are what their manifest says, to the last byte, and where they are not."""

from collections.abc import Callable

from llamagen_dist.data.index import index_name
from llamagen_dist.data.manifest import MANIFEST, ShardRecord
from llamagen_dist.data.shards import Shards
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file


def verify(shards: Shards, advance: Callable[[int, str], None] = lambda count, text: None) -> None:
    """Read every byte and compare sha256 with the manifest. (Remote shards are compared as they arrive in the cache.)

    advance: called with (samples, shard name) after each shard. Raises UserError with one line for each
    damaged file, naming both hashes.
    """
    problems = []
    for record in shards.manifest.shards:
        if shards.cache is None:
            problems += _problems(shards, record)
        else:
            try:
                shards.cache.shard(record).close()
                if record.layout is None:
                    shards.cache.index(record).close()
            except UserError as error:
                problems.append(str(error))
        advance(record.samples, record.name)
    if problems:
        raise UserError("\n".join(problems))


def _problems(shards: Shards, record: ShardRecord) -> list[str]:
    """What is wrong with the files of one local shard, one sentence each."""
    expected, problems = [(record.name, record.sha256)], []
    if record.index_sha256 is not None:
        expected.append((index_name(record.name), record.index_sha256))
    for name, recorded in expected:
        path = shards.folder / name
        try:
            found = sha256_file(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
            continue
        if found != recorded:
            problems.append(
                f"{path}: sha256 {found}, but {MANIFEST} records {recorded}: its bytes have changed; copy or make "
                "it again"
            )
    return problems
