"""YAML as this project reads it."""

import yaml


class UniqueKeyLoader(yaml.SafeLoader):
    """A key that occurs twice in a mapping is an error: of two blocks YAML would silently drop the first."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return node
