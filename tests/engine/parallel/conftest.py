"""A directory with a tiny model and data, for runs on several devices."""

import pytest
from tests.support.behaviour import furnish


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    furnish(directory)
    return directory
