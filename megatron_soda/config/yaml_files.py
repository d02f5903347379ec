"""YAML in which no key may be listed twice: YAML itself keeps the last one without a word."""

from pathlib import Path
from typing import Any

import yaml

from ..files import reading

_MERGE = "tag:yaml.org,2002:merge"


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

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges (<<) by YAML's rule: own keys win, then those of the first mapping in a list. PyYAML 6.0.4 returns an
        overridden value where a mapping that merges is merged itself."""
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        merged = [value for key, value in node.value if key.tag == _MERGE]
        node.value = own
        found = {}
        for one in reversed([one for value in merged for one in _mappings(value)]):
            self.flatten_mapping(one)
            found |= {_name(key): (key, value) for key, value in one.value}
        node.value = list((found | {_name(key): (key, value) for key, value in own}).values())
        super().flatten_mapping(node)


def _mappings(node: yaml.Node) -> list[yaml.MappingNode]:
    found: list[yaml.MappingNode] = []
    for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(one, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, f"line {one.start_mark.line + 1}: << needs a mapping")
        found.append(one)
    return found


def _name(key: yaml.Node) -> tuple[str, str] | int:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


def read_yaml(path: Path) -> Any:
    """SodaError for a file that does not exist, is not YAML, or has a key twice."""
    with reading(path, "not YAML"):
        return yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
