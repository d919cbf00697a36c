"""What goes wrong on request: errors, silence, cut, slow and damaged transfers."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field

KINDS = ("status", "error", "hang", "drop", "throttle", "corrupt", "lose", "drip", "endless")


@dataclass
class Fault:
    """Strikes the requests whose label `match` is found in, `count` times or for `seconds`, without either for good.

    Labels are "graphql OPERATION", "file_stream ENTITY/PROJECT/RUN", "put artifact/NAME", "put manifest/ID",
    "put run/NAME", the same three with "get", "otel", "app" (a browser's question). Kinds:
    `status` answers `code`, with `message` as W&B's GraphQL gives its reason; `error` answers 200 with a GraphQL
    error; `hang` answers after the fault is over;
    `drop` resets the connection, of an upload or download after `after_bytes`; `throttle` takes `bytes_per_second`
    of an upload or a download; `drip` answers with a byte each half second, `endless` with as many as are taken, both
    without an end; `corrupt` flips a stored byte of an upload that arrived whole; `lose` answers a file_stream request
    as if it were kept, and keeps nothing: to the server as if the client had never sent it.
    """

    kind: str
    match: str = ""
    count: int | None = None
    seconds: float | None = None
    code: int = 500
    message: str = ""
    after_bytes: int = 0
    bytes_per_second: int = 0
    born: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind}: use one of {', '.join(KINDS)}")

    @property
    def over(self) -> bool:
        return self.count == 0 or (self.seconds is not None and time.monotonic() > self.born + self.seconds)


class Faults:
    """The faults that are set."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        self._faults.append(fault)

    def clear(self) -> None:
        self._faults.clear()

    def take(self, kind: str, label: str) -> Fault | None:
        """The fault of this kind that strikes now, if any."""
        self._faults = [fault for fault in self._faults if not fault.over]
        for fault in self._faults:
            if fault.kind == kind and re.search(fault.match, label):
                if fault.count is not None:
                    fault.count -= 1
                return fault
        return None

    async def hang(self, label: str) -> bool:
        """Return when no fault holds this request any more. Returns whether one did."""
        fault = self.take("hang", label)
        while fault and fault in self._faults and not (fault.seconds is not None and fault.over):
            await asyncio.sleep(0.02)
        return fault is not None
