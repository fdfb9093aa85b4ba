"""Reading token shards: headers of .npy files, and sets so large that nothing may depend on their size."""

import io
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.data.npy import shape_of
from llamagen_dist.data.order import Order
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream, codes_bytes
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology
from tests.bench import token_sets


def uint16_shape(header):
    return shape_of(header, "<u2")


def numpys(shape, dtype="<u2", order="C") -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype, order), allow_pickle=False)
    return file.getvalue()


SHAPE = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@given(shape=SHAPE)
def test_headers_are_read_as_numpy_writes_them(shape):
    size = 2 * int(np.prod(shape, dtype=int))
    data = numpys(shape)
    assert uint16_shape(data[: len(data) - size]) == shape
    if len(shape) == 2:
        ours = codes_bytes(np.zeros(shape, np.uint16))
        assert uint16_shape(ours[: len(ours) - size]) == shape
        assert np.load(io.BytesIO(ours), allow_pickle=False).shape == shape


@settings(max_examples=300)
@given(
    header=st.binary(max_size=80)
    | st.tuples(st.just(numpys((3, 4))[:128]), st.integers(0, 127), st.integers(1, 255)).map(
        lambda t: t[0][: t[1]] + bytes([t[0][t[1]] ^ t[2]]) + t[0][t[1] + 1 :]
    )
)
def test_a_damaged_header_is_no_header_or_says_what_numpy_says(header):
    found = uint16_shape(header)
    if found is not None:
        array = np.lib.format.read_array(io.BytesIO(header + b"\0" * 2 * int(np.prod(found))), allow_pickle=False)
        assert (array.shape, array.dtype) == (found, np.uint16)


@pytest.mark.parametrize("data", [numpys((2, 3), ">u2"), numpys((2, 3), "<i2"), numpys((2, 3), order="F")])
def test_other_arrays_are_told_apart(data):
    assert uint16_shape(data[:128]) is None
    assert uint16_shape(numpys((2, 3))[:128]) == (2, 3)
    deep = b"\x93NUMPY\x01\x00" + (900).to_bytes(2, "little") + b"(" * 900
    assert uint16_shape(deep) is None


def test_a_billion_samples_cost_nothing(tmp_path):
    """A thousand shards of a million samples, whose files are holes but for the samples that are read."""
    count, start, batch = 10**9, 10**8, 64
    folder = token_sets.write_sparse(tmp_path / "sparse", 1000, 10**6, 20, 16, 1000, 16384)
    samples = Order(count, 7).samples(start, batch)
    token_sets.fill(open_shards(folder), samples.numpy())
    tracemalloc.start()
    stream = TokenStream(open_shards(folder), Topology(), batch, 7, 0.0)
    found = stream.batch(start)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20, "the shards' records, and one batch"
    assert torch.equal(found.samples, samples)
    assert torch.equal(found.condition, samples % 1000)
    expected = [token_sets.codes_of(sample, 20, 256, 16384).astype(int).tolist() for sample in samples.tolist()]
    assert all(row in crops for row, crops in zip(found.tokens.tolist(), expected, strict=True))
    with pytest.raises(UserError, match="is not one of the 1000 classes"):
        stream.batch(start + batch)  # sabotage twin: there is a hole
