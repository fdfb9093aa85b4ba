"""Small sets of pictures, of every kind that can be packed."""

import pytest

from tests.unit import picture_sources


@pytest.fixture
def captioned(tmp_path):
    return picture_sources.captioned(tmp_path / "pairs")


@pytest.fixture
def foreign(tmp_path):
    return picture_sources.foreign(tmp_path / "foreign")


@pytest.fixture
def imagenet(tmp_path):
    return picture_sources.imagenet(tmp_path)
