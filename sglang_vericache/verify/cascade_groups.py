"""Which requests of a verification read a prefix together. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PrefixGroup:
    """Requests whose contexts begin with the same tokens, in the same slots.

    Attributes:
        members: their places, ascending.
        tokens: how many they share.
    """

    members: tuple[int, ...]
    tokens: int

    @property
    def saved_tokens(self) -> int:
        """Tokens that need not be read again when the members read them together."""
        return (len(self.members) - 1) * self.tokens


# A node of a path: its id, and its end in tokens from the root.
NodeEnd = tuple[int, int]


@dataclass
class _Node:
    end: int
    members: list[int] = field(default_factory=list)
    children: list[NodeEnd] = field(default_factory=list)


def group_by_prefix(paths: Sequence[Sequence[NodeEnd]]) -> list[PrefixGroup]:
    """Groups that save the most reading, each request in one at most.

    A prefix is read at one level: the requests below a node share what ends there, or those below
    each of its children share more, whichever saves more.

    Args:
        paths: the nodes of each request in the radix tree, from the root; a node has the same id
            and end in all paths that it is part of.
    """
    nodes: dict[NodeEnd, _Node] = {}
    for place, path in enumerate(paths):
        parent: _Node | None = None
        for key in path:
            node = nodes.get(key)
            if node is None:
                node = nodes[key] = _Node(key[1])
                if parent is not None:
                    parent.children.append(key)
            node.members.append(place)
            parent = node
    best: dict[NodeEnd, list[PrefixGroup]] = {}
    for key in sorted(nodes, key=lambda key: key[1], reverse=True):  # children end later
        node = nodes[key]
        below = [group for child in node.children for group in best[child]]
        whole = PrefixGroup(tuple(node.members), node.end)
        saved = sum(group.saved_tokens for group in below)
        best[key] = [whole] if whole.saved_tokens > saved else below
    inner = {child for node in nodes.values() for child in node.children}
    groups = [group for key, found in best.items() if key not in inner for group in found]
    return sorted(groups, key=lambda group: group.members)
