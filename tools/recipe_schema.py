"""Writes docs/recipe.schema.json, with which editors complete a recipe's keys and check their values.

python tools/recipe_schema.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_soda.config.loading import recipe_schema

(Path(sys.path[0]) / "docs/recipe.schema.json").write_text(json.dumps(recipe_schema(), indent=1) + "\n")
