from pathlib import Path

import pytest

from tests.full.runs import RECIPE
from tests.helpers import write_data


@pytest.fixture
def recipe(tmp_path) -> Path:
    write_data(tmp_path / "run" / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(run=tmp_path / "run"))
    return path
