"""YAML in which no key may be listed twice: YAML itself keeps the last one without a word."""

from pathlib import Path
from typing import Any

import yaml

from ..files import reading


class UniqueKeys(yaml.SafeLoader):
    """A safe loader. A key that a mapping has twice is an error, which names the second one's line."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # constructing it later adds the keys that it merges (<<)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"line {key.start_mark.line + 1}: {key.value} is duplicated"
                    )
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> Any:
    """SodaError for a file that does not exist, is not YAML, or has a key twice."""
    with reading(path, "not YAML"):
        return yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
