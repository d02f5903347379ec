from pathlib import Path

import pytest

from tests.distributed.pool import Pool
from tests.helpers import write_data


@pytest.fixture(scope="package")  # gloo leaves threads behind for every group that was; later tests need the cores
def pool():
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="package")
def saved(pool, data, tmp_path_factory) -> Path:
    """A run on two ranks with the checkpoints of steps 3, 6, 9 and 12. Copy it before you write to it."""
    from tests.distributed.test_checkpoint import SAVES
    from tests.distributed.test_layouts import train

    run = tmp_path_factory.mktemp("saved")
    pool.run(2, train, str(run), str(data), SAVES)
    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))
