from pathlib import Path

import pytest

from tests.distributed.pool import Pool
from tests.helpers import write_data


@pytest.fixture(scope="package")  # gloo leaves threads behind for every group that was; later tests need the cores
def pool():
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))
