"""The graph of a model as a run gets it, without wandb's process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class GraphRun:
    """What `log_graph` needs of a run: its folder and its summary."""

    def __init__(self, folder: Path) -> None:
        self.dir, self.summary = str(folder), dict[str, Any]()
        self.published: list[str] = []

    def _publish_file(self, path: str) -> None:
        self.published.append(path)

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the one graph that was recorded, none before that."""
        if "graph_0" not in self.summary:
            return []
        (path,) = self.published
        nodes: list[dict[str, Any]] = json.loads((Path(self.dir) / path).read_text(encoding="utf-8"))["nodes"]
        return nodes

    @property
    def shapes(self) -> dict[str, Any]:
        """The shapes of the outputs by the names of the layers, in the order of the nodes."""
        return {node["name"]: node.get("output_shape") for node in self.nodes}
