"""Text batches: captions of any length from the shards, by position, whatever the ranks and resumes."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.data.manifest import CaptionEncoding, Manifest, write_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenReader, TokenStream, codes_bytes
from llamagen_dist.data.writer import shard_name, write_shard
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.gpt_task import training_condition

COUNT, CROPS, TOKENS, DIM, PLACES = 40, 2, 4, 3, 6
MEMBERS = (".caption.npy", ".codes.npy", ".short.npy", ".txt")


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def caption_of(number: int, short: bool) -> torch.Tensor:
    """Features that name their sample and kind; 1 to 6 tokens, of the short one 1 or 2. Exact in bfloat16."""
    length = 1 + (number % 2 if short else number % PLACES)
    return torch.full((length, DIM), number + (0.5 if short else 0.0)).bfloat16()


def bits(features: torch.Tensor) -> np.ndarray:
    return features.view(torch.int16).numpy().view(np.uint16)


def parts(number: int) -> dict[str, bytes]:
    return {
        ".codes.npy": codes_bytes((number * 8 + np.arange(8).reshape(CROPS, TOKENS)).astype(np.uint16)),
        ".caption.npy": npy(bits(caption_of(number, short=False))),
        ".short.npy": npy(bits(caption_of(number, short=True))),
        ".txt": b"a picture" * number,
    }


def write(folder, change=lambda number, parts: parts, **manifest):
    folder.mkdir(exist_ok=True)
    records = tuple(
        write_shard(
            folder, shard_name(k), [(f"{n:06d}", change(n, parts(n))) for n in range(20 * k, 20 * k + 20)], MEMBERS
        )
        for k in range(2)
    )
    whole = Manifest(
        "tokens", COUNT, MEMBERS, records, image_size=16, vocab_size=1000, grid=(2, 2), crops=CROPS,
        tokenizer_sha256="0" * 64, captions=CaptionEncoding("t5", "1" * 64, DIM, PLACES, "llamagen-1", True),
    )  # fmt: skip
    write_manifest(folder, replace(whole, **manifest))
    return open_shards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("captions"))


def stream(shards, rank=0, ranks=1, batch=24, seed=3, dropout=0.2, short=0.3, shape=(PLACES, DIM)):
    return TokenStream(
        shards, Topology(rank=rank, world=ranks), batch, seed, dropout, caption_shape=shape, short_share=short
    )


def kinds(batch) -> list[str]:
    """Checks that every row's caption is its sample's, in its place, and says which of the three it got."""
    features, present = batch.condition
    assert features.dtype == torch.bfloat16
    assert features.shape == (*present.shape, DIM)
    found = []
    for row, sample in enumerate(batch.samples.tolist()):
        assert batch.tokens[row, 0] // 8 == sample
        length = int(present[row].sum())
        assert present[row].tolist() == [False] * (PLACES - length) + [True] * length
        short = bool(features[row, -1, 0] % 1)
        expected = caption_of(sample, short)
        assert torch.equal(features[row, PLACES - length :], expected)
        assert not features[row, : PLACES - length].any()
        dropped = batch.dropped is not None and bool(batch.dropped[row])
        found.append("null" if dropped else "short" if short else "long")
    return found


def test_captions_are_their_samples_own_and_chosen_by_position(shards):
    found = kinds(stream(shards, batch=3000).batch(0))
    shares = {kind: found.count(kind) / len(found) for kind in ("null", "short", "long")}
    assert abs(shares["null"] - 0.2) < 0.03
    assert abs(shares["short"] / (1 - shares["null"]) - 0.3) < 0.03
    assert set(kinds(stream(shards, dropout=0.0, short=0.0).batch(0))) == {"long"}
    assert set(kinds(stream(shards, dropout=0.0, short=1.0).batch(0))) == {"short"}
    assert set(kinds(stream(shards, dropout=1.0).batch(0))) == {"null"}
    assert kinds(stream(shards, batch=48, seed=4).batch(0)) != kinds(stream(shards, batch=48).batch(0))


def flat(batch) -> tuple[torch.Tensor, ...]:
    return (batch.tokens, *batch.condition, batch.positions, batch.samples, batch.dropped)


def whole(shards, images_seen, ranks):
    pieces = [flat(stream(shards, rank, ranks).batch(images_seen)) for rank in range(ranks)]
    return [torch.cat(piece) for piece in zip(*pieces, strict=True)]


@settings(max_examples=10, deadline=None)
@given(images_seen=st.integers(0, 10**12))
def test_global_batches_are_the_same_for_any_ranks_and_at_any_point(shards, images_seen):
    alone = whole(shards, images_seen, 1)
    for ranks in (2, 3, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(alone, whole(shards, images_seen, ranks), strict=True))
    shifted = whole(shards, images_seen + 1, 1)  # sabotage twin
    assert not torch.equal(alone[1], shifted[1])


def test_validation_shows_every_caption_once_whole(shards):
    seen = []
    for rank in range(3):
        for batch in stream(shards, rank, 3, dropout=1.0, short=1.0).validation_batches(30, 7):
            assert set(kinds(replace(batch, samples=batch.positions))) == {"long"}
            assert (batch.tokens[:, 0] % 8 == 0).all()
            seen += batch.positions.tolist()
    assert sorted(seen) == list(range(30))


def test_the_null_caption_is_the_one_that_the_model_knows(shards):
    config = GPTConfig(
        n_layer=1, n_head=2, dim=16, vocab_size=1000, image_tokens=TOKENS, condition="text", prefix_tokens=PLACES,
        caption_dim=DIM, multiple_of=16,
    )  # fmt: skip
    model = GPT(config).initialize(5)
    batch = stream(shards).batch(0)
    assert 0 < int(batch.dropped.sum()) < len(batch.dropped)
    expected, expected_present = model.null_condition(batch.condition)
    features, present = training_condition(model, batch)
    assert torch.equal(features[batch.dropped], expected[batch.dropped])
    assert torch.equal(features[~batch.dropped], batch.condition[0][~batch.dropped])
    assert not torch.equal(features[batch.dropped], batch.condition[0][batch.dropped])
    assert features.dtype == torch.bfloat16
    assert torch.equal(present, expected_present)
    model.eval()
    assert model.loss(batch.tokens, (features, present)).isfinite()
    model.cls_embedding.uncond_embedding = torch.full((PLACES, DIM), 5.0)  # as a resume does, after the stream is built
    assert (training_condition(model, batch)[0][batch.dropped] == 5).all()
    assert training_condition(model, replace(batch, dropped=None)) is batch.condition
    [piece] = batch.rows(slice(4, 20)).split(100)
    assert torch.equal(training_condition(model, piece)[0], training_condition(model, batch)[0][4:20])


def test_what_does_not_fit_is_refused(shards, tmp_path):
    cases = [
        ({"shape": (PLACES, 9)}, r"model.caption_dim: is 9, but .* have 3 features; set it to 3"),
        ({"shape": (5, DIM)}, r"model.prefix_tokens: is 5, but .* up to 6 tokens; set it to 6"),
        ({"shape": None}, "no class labels"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            stream(shards, **options)
    bare = write(tmp_path / "bare", captions=None)
    with pytest.raises(UserError, match="holds no caption features, and a text-conditional model needs them"):
        stream(bare)
    only_long = write(tmp_path / "long", captions=replace(shards.manifest.captions, short=False))
    with pytest.raises(UserError, match=r"data.short_captions: .* holds no short captions"):
        stream(only_long)
    assert set(kinds(stream(only_long, short=0.0).batch(0))) <= {"long", "null"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (npy(np.zeros((2, DIM + 1), np.uint16)), r"does not hold uint16 \[1 to 6, 3\]"),
        (npy(np.zeros((PLACES + 1, DIM), np.uint16)), "does not hold"),
        (npy(np.zeros((0, DIM), np.uint16)), "does not hold"),
        (npy(np.zeros((2, DIM), np.float16)), "does not hold"),
        (npy(np.zeros((2, DIM), np.uint16))[:-2], "does not hold"),
        (b"", "does not hold"),
        (b"\x80\x04K\x01.", "does not hold"),  # a pickle is not even looked at
        (None, r"sample 3 has no \.caption\.npy"),
    ],
)
def test_bad_captions_are_named(tmp_path, bad, message):
    def change(number, good):
        if number == 23:
            good = good | {".caption.npy": bad}
        return {name: data for name, data in good.items() if data is not None}

    reader = TokenReader(write(tmp_path / "bad", change))
    fine = [n for n in range(COUNT) if n != 23]
    assert len(reader.caption_features(np.array(fine), np.zeros(39, np.bool_))) == 39
    with pytest.raises(UserError, match=rf"shard-000001.tar: sample 3.*{message}|{message}"):
        reader.caption_features(np.array([22, 23]), np.zeros(2, np.bool_))
    assert len(reader.caption_features(np.array([22, 23]), np.ones(2, np.bool_))) == 2  # its short one is fine


def test_codes_of_another_size_among_records_of_different_lengths(tmp_path):
    def change(number, good):
        return good | ({".codes.npy": codes_bytes(np.zeros((CROPS, 9), np.uint16))} if number == 23 else {})

    reader = TokenReader(write(tmp_path / "mixed", change))
    assert reader.num_classes is None
    tokens = reader.codes(np.array([22, 5]), np.array([1, 0]))
    assert tokens[:, 0].tolist() == [22 * 8 + 4, 5 * 8]
    with pytest.raises(UserError, match="no class labels"):
        reader.labels(np.array([22]))
    with pytest.raises(UserError, match=r"shard-000001.tar: sample 3: its .codes.npy is not uint16 \[2, 4\]"):
        reader.codes(np.array([22, 23]), np.array([0, 0]))
