"""YAML as this project reads it."""

from typing import Any

import yaml

_DEEPEST = 50  # the configurations have 3 levels
_MOST_ALIASES = 100  # 10 levels of 10 aliases each are 10^10 values


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML within bounds, in which a key that occurs twice in a mapping is an error: YAML would drop the first.

    Nesting and aliases, which a few bytes can make as deep and as many as no memory holds, are bounded.
    """

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._depth = self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._aliases += self.check_event(yaml.AliasEvent)
        if self._depth >= _DEEPEST or self._aliases > _MOST_ALIASES:
            problem = "nested too deeply" if self._depth >= _DEEPEST else "too many aliases"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return node
