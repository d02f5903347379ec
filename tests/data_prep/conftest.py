import functools

import pytest

from megatron_soda.codecs import embedded


@pytest.fixture(scope="session", autouse=True)
def one_decoder():
    """The embedded codec's decoder, which nothing changes, is loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "load_decoder", functools.cache(embedded.load_decoder))
        yield
