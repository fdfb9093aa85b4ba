"""Compressed .npz: read through the stream, in any order, in bounded memory; damage is one sentence."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_sets import open_images

ROOT = Path(__file__).parent.parent.parent


def pictures(n: int, side: int = 40) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (n, side, side, 3)).astype(np.uint8)


def packed(path: Path, n: int = 9) -> Path:
    np.savez_compressed(path, arr_0=pictures(n), labels=np.arange(n))
    return path


def test_pictures_are_read_forwards_backwards_and_twice(tmp_path):
    images = open_images(packed(tmp_path / "a.npz"))
    assert not isinstance(images.pixels, np.ndarray)
    for indices in ([0, 1, 2], [7, 8], [3, 1], [5, 5], [8], []):
        assert np.array_equal(images.read(np.array(indices, np.int64)), pictures(9)[indices])
    assert images.labels.tolist() == list(range(9))
    assert not np.array_equal(images.read(np.array([3])), pictures(9)[[4]])


def damaged(path: Path, at: float) -> Path:
    """One byte of the packed pictures is another."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("arr_0.npy")
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 100 + int(at * (entry.compress_size - 100))] ^= 255
    path.write_bytes(data)
    return path


def test_a_damaged_stream_is_one_sentence(tmp_path):
    whole = np.arange(9)
    for at in (0.3, 0.9):
        images = open_images(damaged(packed(tmp_path / "a.npz"), at))
        with pytest.raises(
            UserError, match=r"a\.npz: picture \d of 9 cannot be unpacked \(.*make or copy it again"
        ) as refused:
            images.read(whole)
        assert "\n" not in str(refused.value)
    assert open_images(packed(tmp_path / "a.npz")).read(whole).shape == (9, 40, 40, 3)


@pytest.mark.parametrize("share", [0.2, 0.7, 0.99])
def test_a_truncated_file_is_refused_when_it_is_opened(tmp_path, share):
    path = packed(tmp_path / "a.npz")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"a\.npz: cannot be read as an \.npz"):
        open_images(path)


def test_a_member_that_is_shorter_than_its_header_says_is_refused(tmp_path):
    path = packed(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", content[:-400])
    with pytest.raises(UserError, match=r"arr_0\.npy ends too early"):
        open_images(path)


@pytest.mark.long
def test_memory_does_not_grow_with_the_pictures(tmp_path):
    """40 MB of pictures are read in batches of 100; the twin reads them at once."""
    np.savez_compressed(tmp_path / "a.npz", arr_0=pictures(3300, 64))
    code = (
        "import sys; import numpy as np; from pathlib import Path\n"
        "from llamagen_dist.evaluation.image_sets import open_images\n"
        "from llamagen_dist.process import peak_rss_gb\n"
        "images, step = open_images(Path(sys.argv[1])), int(sys.argv[2])\n"
        "images.read(np.arange(9)); before = peak_rss_gb()\n"
        "for i in range(0, 3300, step): images.read(np.arange(i, min(i + step, 3300)))\n"
        "print(1000 * (peak_rss_gb() - before))"
    )
    grown = {}
    for step in (100, 3300):
        words = [sys.executable, "-c", code, str(tmp_path / "a.npz"), str(step)]
        ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        grown[step] = float(ran.stdout)
    assert grown[100] < 10
    assert grown[3300] > 30
