"""One server of vpt-mini for all tests that ask one."""

from __future__ import annotations

import pytest

from bench.vllm_server import served
from vpt_model import mini


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    """Where it listens; it starts with the first test that asks it something."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with served(mini.FOLDER, log, "--reasoning-parser", "vpt", "--max-num-seqs", "8") as (where, _):
        yield where


@pytest.fixture(scope="session")
def client(address):
    from tests.serving.clients import client_of

    return client_of(address)


@pytest.fixture(scope="session")
def engine():
    from tests.serving.engines import our_engine

    return our_engine(mini.FOLDER)
