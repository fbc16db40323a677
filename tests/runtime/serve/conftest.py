"""What tests of both protocols share: a server of one engine, and the same engine called directly."""

import pytest
from serving import serving

from fcn_deploy import Segmenter


@pytest.fixture(scope="module")
def server(exports):
    with serving(exports / "narrow.engine") as (client, _):
        yield client


@pytest.fixture(scope="module")
def net(exports):
    with Segmenter(exports / "narrow.engine", threads=2) as net:
        yield net
