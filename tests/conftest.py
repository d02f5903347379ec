import os

import pytest
from hypothesis import settings

# Before numpy and scipy: on matrices as small as in these tests, OpenBLAS's threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
settings.register_profile("soda", deadline=None)  # a busy machine is no defect
settings.load_profile("soda")


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory):
    """A run with an exported model of random weights (tests/exported.py)."""
    from tests.exported import write_exported

    return write_exported(tmp_path_factory.mktemp("exported") / "run")


@pytest.fixture
def exported(exported_once, tmp_path, monkeypatch):
    """The same run, copied, so that a test may write to it. Its codec is a fake one."""
    import shutil
    from dataclasses import replace

    from megatron_soda.codecs import description
    from tests.exported import FakeCodec

    run = shutil.copytree(exported_once.run, tmp_path / "run")
    monkeypatch.setattr(description, "_load", lambda *_: FakeCodec())
    return replace(exported_once, run=run, folder=run / "hf")
