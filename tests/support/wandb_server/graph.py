"""What the resolvers share: the context of a request, ids, connections, names."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ariadne import MutationType

from .artifacts import Artifacts
from .database import Database, Refused, Row
from .faults import Faults
from .runs import Runs

USER, ORGANIZATION, ORG_ENTITY = "tester", "Test Organization", "test-org"


@dataclass(frozen=True)
class Context:
    """What a resolver works on. `base_url` is how the client reached the server."""

    database: Database
    runs: Runs
    artifacts: Artifacts
    faults: Faults
    base_url: str = ""

    def project(self, entity: str | None, name: str | None, *, create: bool = False) -> Row | None:
        return self.database.project(entity or USER, name or "uncategorized", create=create)

    def require_project(self, entity: str | None, name: str | None) -> Row:
        found = self.project(entity, name)
        if not found:
            raise Refused(f"project {entity or USER}/{name} not found")
        return found

    def require(self, table: str, global_id: str) -> Row:
        found = self.database.get(table, number_of(global_id))
        if not found:
            raise Refused(f"{table}: {global_id} not found")
        return found


def id_of(kind: str, number: Any) -> str:
    return base64.b64encode(f"{kind}:{number}".encode()).decode()


def number_of(global_id: str) -> int:
    try:
        return int(base64.b64decode(global_id).decode().rpartition(":")[2])
    except ValueError:
        raise Refused(f"{global_id} is not an id") from None


def ids(kind: str) -> Callable[..., str]:
    """A resolver for the field `id` of a row."""
    return lambda row, _: id_of(kind, row["id"])


def mutates(mutation: MutationType, name: str) -> Callable[[Callable[[Any, Row], Any]], Callable[[Any, Row], Any]]:
    """Register a resolver that takes the info and the field's `input`; it runs in one transaction."""

    def register(resolve: Callable[[Any, Row], Any]) -> Callable[[Any, Row], Any]:
        def resolver(_: Any, info: Any, **arguments: Any) -> Any:
            with info.context.database.transaction():
                return resolve(info, arguments["input"])

        mutation.set_field(name, resolver)
        return resolve

    return register


def snake_case(name: str, *_: Any) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def connection(nodes: Sequence[Any], first: int | None = None, after: str | None = None) -> dict[str, Any]:
    """A page of `nodes`, from the one behind the cursor `after` on."""
    start = int(after or 0)
    end = len(nodes) if first is None else min(len(nodes), start + first)
    return {
        "edges": [{"node": node, "cursor": str(number)} for number, node in enumerate(nodes[start:end], start + 1)],
        "page_info": {"end_cursor": str(end) if end else None, "has_next_page": end < len(nodes)},
        "total_count": len(nodes),
    }


def like(pattern: str) -> re.Pattern[str]:
    """SQL's LIKE as a regular expression."""
    return re.compile("".join({"%": ".*", "_": "."}.get(letter, re.escape(letter)) for letter in pattern), re.DOTALL)


def matches(filters: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a record passes a filter in MongoDB's language: the part of it that wandb's client sends."""
    for name, wanted in filters.items():
        if name == "$and":
            passes = all(matches(each, record) for each in wanted)
        elif name == "$or":
            passes = any(matches(each, record) for each in wanted)
        else:
            passes = _compare(_at(name, record), wanted if isinstance(wanted, dict) else {"$eq": wanted})
        if not passes:
            return False
    return True


def _at(name: str, record: Any) -> Any:
    for part in name.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def _compare(value: Any, wanted: Mapping[str, Any]) -> bool:
    tests: dict[str, Callable[[Any], bool]] = {
        "$eq": lambda x: value == x or (isinstance(value, list) and x in value),
        "$ne": lambda x: value != x and not (isinstance(value, list) and x in value),
        "$in": lambda x: value in x or (isinstance(value, list) and any(each in x for each in value)),
        "$regex": lambda x: bool(re.search(x, str(value))),
        "$gt": lambda x: value is not None and value > x,
        "$gte": lambda x: value is not None and value >= x,
        "$lt": lambda x: value is not None and value < x,
        "$lte": lambda x: value is not None and value <= x,
        "$exists": lambda x: (value is not None) == x,
    }
    unknown = set(wanted) - set(tests)
    if unknown:
        raise NotImplementedError(f"filters: {', '.join(unknown)}")
    return all(tests[name](operand) for name, operand in wanted.items())
