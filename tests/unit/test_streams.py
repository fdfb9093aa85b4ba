"""Token and image streams: batches are a function of position, whatever the ranks, workers and resumes."""

import io

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llamagen_dist.data import images
from llamagen_dist.data.images import ImageStream, load_images
from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream, codes_bytes
from llamagen_dist.data.writer import label_text, shard_name, write_shard
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology

COUNT, CLASSES, CROPS, TOKENS, VOCABULARY = 50, 12, 3, 4, 1000


def codes_of(number: int) -> np.ndarray:
    """A code names its sample, crop and place, so that any mix-up shows."""
    return (number * 12 + np.arange(CROPS * TOKENS).reshape(CROPS, TOKENS)).astype(np.uint16)


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    records, members = [], (".cls", ".codes.npy")
    for shard, (first, last) in enumerate([(0, 20), (20, 21), (21, 50)]):
        samples = [
            (f"{n:09d}", {".cls": label_text(n % CLASSES, CLASSES), ".codes.npy": codes_bytes(codes_of(n))})
            for n in range(first, last)
        ]
        records.append(write_shard(folder, shard_name(shard), samples, members))
    manifest = Manifest(
        "tokens", COUNT, members, tuple(records), [str(n) for n in range(CLASSES)], image_size=16,
        vocab_size=VOCABULARY, grid=(2, 2), crops=CROPS, tokenizer_sha256="0" * 64,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def tokens(token_folder):
    return open_shards(token_folder)


def rank(number: int, dp: int, tensor: int = 1) -> Topology:
    return Topology(rank=number * tensor, world=dp * tensor, tensor=tensor)


def whole(shards, images_seen, ranks, dropout=0.1, seed=3, window=0):
    parts = [
        TokenStream(shards, rank(r, ranks), 24, seed, dropout, window_shards=window).batch(images_seen)
        for r in range(ranks)
    ]
    names = ("tokens", "condition", "positions", "dropped")
    return tuple(torch.cat([getattr(part, name) for part in parts]) for name in names)


def test_tokens_labels_and_crops_belong_together(tokens):
    seen_crops, samples = set(), []
    for start in range(0, 2 * COUNT, 10):
        batch = TokenStream(tokens, Topology(), 10, 0, 0.0).batch(start)
        assert batch.tokens.dtype == batch.condition.dtype == batch.positions.dtype == torch.int64
        for row, label in zip(batch.tokens, batch.condition, strict=True):
            sample, rest = divmod(int(row[0]), CROPS * TOKENS)
            crop = rest // TOKENS
            assert row.tolist() == codes_of(sample)[crop].tolist()
            assert label == sample % CLASSES
            seen_crops.add(crop)
            samples.append(sample)
    assert seen_crops == {0, 1, 2}
    assert sorted(samples[:COUNT]) == sorted(samples[COUNT:]) == list(range(COUNT))
    assert samples[:COUNT] != samples[COUNT:]


@settings(max_examples=15, deadline=None)
@given(images_seen=st.integers(0, 10**12), seed=st.integers(0, 5), window=st.integers(0, 3))
def test_global_batches_are_the_same_for_1_2_3_4_and_8_ranks(tokens, images_seen, seed, window):
    alone = whole(tokens, images_seen, 1, seed=seed, window=window)
    for ranks in (2, 3, 4, 8):
        cut_up = whole(tokens, images_seen, ranks, seed=seed, window=window)
        assert all(torch.equal(a, b) for a, b in zip(alone, cut_up, strict=True))
    shifted = whole(tokens, images_seen + 1, 1, seed=seed, window=window)
    assert not torch.equal(alone[0], shifted[0])


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(1, 8), share=st.integers(1, 9), window=st.integers(0, 3), epoch=st.integers(0, 10**6))
def test_each_sample_once_per_epoch_also_where_batches_do_not_divide_it(tokens, ranks, share, window, epoch):
    """Shards of 20, 1 and 29 samples; batches run over the ends of shards, windows and epochs."""
    batch = ranks * share
    streams = [TokenStream(tokens, rank(r, ranks), batch, 1, 0.1, window_shards=window) for r in range(ranks)]
    first = epoch * COUNT // batch * batch
    shown = torch.cat(
        [stream.batch(start).samples for start in range(first, (epoch + 1) * COUNT, batch) for stream in streams]
    )
    assert once_each(shown[epoch * COUNT - first :][:COUNT])


def once_each(samples):
    return sorted(samples.tolist()) == list(range(COUNT))


def test_an_epoch_read_one_position_late_is_noticed(tokens):
    stream = TokenStream(tokens, Topology(), COUNT, 1, 0.1, window_shards=1)
    assert once_each(stream.batch(COUNT).samples)
    assert not once_each(stream.batch(COUNT + 1).samples)


def test_tensor_parallel_ranks_of_one_data_rank_read_the_same(tokens):
    batches = [
        TokenStream(tokens, Topology(rank=r, world=4, tensor=2), 24, 0, 0.1).batch(48).positions for r in range(4)
    ]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[2], batches[3])
    assert torch.equal(torch.cat([batches[0], batches[2]]), torch.arange(48, 72))


def test_resuming_gives_the_batches_of_the_uninterrupted_run(tokens):
    stream = TokenStream(tokens, Topology(), 8, 1, 0.1)
    run = [stream.batch(start).tokens for start in range(0, 400, 8)]
    resumed = TokenStream(tokens, Topology(), 8, 1, 0.1)
    assert all(torch.equal(resumed.batch(start).tokens, run[start // 8]) for start in range(200, 400, 8))
    assert not torch.equal(resumed.batch(192).tokens, run[25])


def test_label_dropout_is_by_position_at_its_rate(tokens):
    def labels(dropout, seed=0):
        batch = TokenStream(tokens, Topology(), 20_000, seed, dropout).batch(0)
        return batch.condition.masked_fill(batch.dropped, CLASSES)

    dropped = labels(0.1) == CLASSES
    assert abs(dropped.float().mean() - 0.1) < 0.01
    assert torch.equal(labels(0.1)[~dropped], labels(0.0)[~dropped])
    assert not torch.equal(labels(0.1, seed=1) == CLASSES, dropped)
    assert labels(0.0).max() == CLASSES - 1


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 7), batch=st.integers(1, 60), limit=st.none() | st.integers(1, 70))
def test_validation_sees_every_held_out_sample_once(tokens, ranks, batch, limit):
    count = COUNT if limit is None else min(limit, COUNT)
    seen, total = [], 0
    for r in range(ranks):
        stream = TokenStream(tokens, rank(r, ranks), 420, 0, 0.5)
        for part in stream.validation_batches(limit, batch):
            assert 0 < len(part.tokens) <= batch
            assert part.condition.tolist() == [n % CLASSES for n in part.positions.tolist()]  # never dropped
            assert part.tokens[:, 0].tolist() == [12 * n for n in part.positions.tolist()]  # crop 0
            seen += part.positions.tolist()
            total += int(part.tokens.sum())
    assert sorted(seen) == list(range(count))
    assert total == sum(int(codes_of(n)[0].sum()) for n in range(count))


def test_validation_batches_do_not_depend_on_the_ranks(tokens):
    def batches(ranks):
        streams = [TokenStream(tokens, rank(r, ranks), 12, 0, 0.0) for r in range(ranks)]
        return sorted(tuple(b.positions.tolist()) for s in streams for b in s.validation_batches(None, 16))

    assert batches(1) == batches(2) == batches(3)


def test_webdataset_streams_the_same_codes(token_folder, tokens):
    stream = webdataset.WebDataset(str(token_folder / "shard-{000000..000002}.tar"), shardshuffle=False)
    found = list(stream.decode())
    assert len(found) == COUNT
    for number, sample in enumerate(found):
        codes = np.load(io.BytesIO(tokens.read(number, ".codes.npy")), allow_pickle=False)
        assert np.array_equal(codes, codes_of(number))
        assert np.array_equal(sample["codes.npy"], codes)
        assert codes.dtype == sample["codes.npy"].dtype == np.uint16
        assert sample["cls"] == number % CLASSES


def test_bad_tokens_are_refused(tokens, token_folder, tmp_path):
    with pytest.raises(UserError, match="25 images cannot be shared equally by 2"):
        TokenStream(tokens, rank(0, 2), 25, 0, 0.0)
    manifest = tokens.manifest

    def variant(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for record in manifest.shards:
            (folder / record.name).write_bytes((token_folder / record.name).read_bytes())
        write_manifest(folder, Manifest(**(dict(manifest.__dict__) | changes)))
        return TokenStream(open_shards(folder), Topology(), COUNT, 0, 0.0)

    variant("fine").batch(0)
    with pytest.raises(UserError, match="holds no tokens"):
        variant("images", kind="images")
    with pytest.raises(UserError, match=r"outside the manifest's 500 codes"):
        variant("codes", vocab_size=500).batch(0)
    with pytest.raises(UserError, match="label b'11' is not one of the 11 classes"):
        variant("labels", classes=["x"] * 11).batch(0)
    with pytest.raises(UserError, match=r"not uint16 \[3, 1\]"):
        variant("grid", grid=(1, 1)).batch(0)
    with pytest.raises(UserError, match="no class labels"):
        variant("bare", classes=None)


SIZE = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """30 smooth pictures of different sizes, some PNG and some JPEG."""
    folder = tmp_path_factory.mktemp("pictures")
    samples = []
    for n in range(30):
        rng = np.random.default_rng(n)
        image = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
        image = image.resize((40 + n, 33 + n % 7), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if n % 3 else "JPEG")
        samples.append((f"{n:09d}", {".png" if n % 3 else ".jpg": buffer.getvalue(), ".cls": b"0"}))
    members = (".cls", ".jpg", ".png")
    records = tuple(write_shard(folder, shard_name(k), samples[15 * k : 15 * k + 15], members) for k in range(2))
    write_manifest(folder, Manifest("images", 30, members, records, ["all"]))
    return open_shards(folder)


def stream(shards, topology=None, workers=0, crop=True, flip=True, batch=12, seed=0, window=0):
    return ImageStream(shards, topology or Topology(), batch, seed, SIZE, crop, flip, workers, window)


@pytest.mark.parametrize("window", [0, 1])
def test_image_batches_are_the_same_for_any_ranks(pictures, window):
    alone = stream(pictures, batch=24, window=window).batch(24).images
    assert alone.shape == (24, 3, SIZE, SIZE)
    assert alone.dtype == torch.float32
    assert -1 <= alone.min() < -0.5 < 0.5 < alone.max() <= 1
    for ranks in (2, 3, 4, 8):
        pieces = [stream(pictures, rank(r, ranks), batch=24, window=window).batch(24).images for r in range(ranks)]
        assert torch.equal(torch.cat(pieces), alone)
    assert not torch.equal(stream(pictures, batch=24, window=window).batch(25).images, alone)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on a machine of two cores
@pytest.mark.parametrize("workers", [1, 4])
def test_decoding_processes_change_nothing_across_a_resume(pictures, workers):
    window = workers % 2
    with_workers, without = stream(pictures, workers=workers, window=window), stream(pictures, window=window)
    for start in (0, 12, 24, 120, 132, 12):  # on, then jumps as after a resume
        assert torch.equal(with_workers.batch(start).images, without.batch(start).images)


def test_crops_and_flips_vary_by_position_and_can_be_switched_off(pictures):
    plain = stream(pictures, crop=False, flip=False, batch=30)
    first, second = plain.batch(0).images, plain.batch(30).images
    order = [int(torch.nonzero((second == image).flatten(1).all(1))[0]) for image in first]
    assert sorted(order) == list(range(30))  # the same pixels in another order
    centre = images.to_floats(load_images(pictures, range(30), SIZE))
    assert all(any(torch.equal(image, other) for other in centre) for image in first)
    mirrored = stream(pictures, crop=False, batch=30).batch(0).images
    flipped = [not torch.equal(a, b) for a, b in zip(first, mirrored, strict=True)]
    assert 8 <= sum(flipped) <= 22
    assert all(torch.equal(a, b.flip(-1)) for a, b, f in zip(first, mirrored, flipped, strict=True) if f)
    cropped = stream(pictures, flip=False, batch=30)
    assert not torch.equal(cropped.batch(0).images, first)
    assert torch.equal(cropped.batch(0).images, stream(pictures, flip=False, batch=30).batch(0).images)
    assert torch.equal(stream(pictures, flip=False, batch=30, seed=1).batch(0).images, cropped.batch(0).images) is False


def test_crops_follow_the_recipe():
    gradient = np.broadcast_to(np.linspace(0, 255, 100).astype(np.uint8)[None, :, None], (80, 100, 3))
    image = Image.fromarray(np.ascontiguousarray(gradient))
    assert images.resize_short_side(image, 20).size == (25, 20)
    assert images.center_crop(image, 20).size == (20, 20)
    right_size = images.center_crop(image, 20)
    assert images.center_crop(right_size, 20) is right_size
    centre = np.asarray(images.center_crop(image, 80))
    assert np.array_equal(centre, gradient[:, 10:90])  # nothing to resample: the exact middle
    views = images.ten_crops(image, 64, 1.1)  # 70 pixels, 6 of room
    large = np.asarray(images.center_crop(image, 70))
    corners = [(0, 0), (0, 6), (6, 0), (6, 6), (3, 3)]
    expected = [view[t : t + 64, x : x + 64] for view in (large, large[:, ::-1]) for t, x in corners]
    assert len(views) == 10
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(views, expected, strict=True))
    for across in (0.0, 0.999):
        window = np.asarray(images.random_crop(image, 64, 80, across, across))
        room = int(across * 37)
        assert np.array_equal(window, gradient[:64, room : room + 64])
    floats = images.to_floats(np.array([0, 255], np.uint8).reshape(1, 2, 1).repeat(3, 2))
    assert floats[:, 0].tolist() == [[-1.0, 1.0]] * 3


def test_an_undecodable_image_is_named(tmp_path, tokens):
    record = write_shard(tmp_path, shard_name(0), [("a", {".png": b"junk"}), ("b", {".png": b"x"})], (".png",))
    write_manifest(tmp_path, Manifest("images", 2, (".png",), (record,)))
    with pytest.raises(UserError, match=r"shard-000000.tar: sample 1: the image cannot be decoded"):
        load_images(open_shards(tmp_path), [1], SIZE)
    with pytest.raises(UserError, match="holds tokens, not images"):
        stream(tokens)
