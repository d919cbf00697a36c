"""What `wandb.watch` shows, of the optimizer step instead of a micro-batch: histograms."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.nn.parallel import DistributedDataParallel

from harness.config import at_least, choice
from harness.distributed.sharding import gathered, is_cut, local_part
from harness.distributed.transfer import to_device
from harness.errors import ConfigError

logger = logging.getLogger(__name__)

LOG = ("gradients", "parameters", "all")
NUM_BINS = 64  # wandb.watch's
# W&B leaves out a whole row, its loss too, whose JSON exceeds 10 MiB - 100 KiB (wandb-core: defaultMaxFileLineBytes),
# and likewise the summary. A histogram takes about 1.9 KB, 2.7 KB at worst: so many leave room for the rest of a row.
MAX_HISTOGRAMS = 3000
# Behind the bins of a table of counts stand the largest value itself, which is the last bin's, and what isn't finite.
NUM_COLUMNS, NOT_FINITE = NUM_BINS + 2, NUM_BINS + 1
# Values at a time: what fits into a core's cache; on an accelerator about 100 MB with all in between.
HOST_BLOCK, DEVICE_CHUNK, ROW = 2**18, 2**22, 2**10


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """What `wandb.Histogram(np_histogram=(values, bins))` takes: counts, and one edge more."""

    values: list[float]
    bins: list[float]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """
    Which parameters are watched, beside what fits into a row of W&B's.

    - max_tensors: at most so many: the first, the last and others at even distances, in the model's order.
    - patterns: only those whose names match one of these (fnmatch, case-sensitive).
    """

    max_tensors: int | None = None
    patterns: Sequence[str] = ()


class Watch:
    """
    Histograms of a model's gradients and parameters at every `log_freq`-th optimizer step. All ranks hold one.

    - log: gradients, parameters or all.
    - selection: of which parameters.
    - gradient_of: collective; the whole gradient of a parameter, where ranks hold parts of it (DeepSpeed's ZeRO).

    `model` may be wrapped by DDP or compiled; names are those of the model inside. Raises ConfigError, on every rank
    alike, for an unknown `log`, a limit below 1 and patterns of which none matches.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        log: str,
        log_freq: int,
        is_main: bool,
        selection: Selection = Selection(),
        gradient_of: Callable[[torch.nn.Parameter], torch.Tensor | None] | None = None,
    ) -> None:
        choice("wandb_watch", log, LOG)
        at_least(1, wandb_watch_max_tensors=selection.max_tensors)
        if log_freq < 1:
            raise ValueError(f"log_freq={log_freq}: use 1 or more.")
        self._log, self._log_freq, self._is_main = log, log_freq, is_main
        self._gradient_of = gradient_of
        named = [
            (name.replace("_orig_mod.", ""), parameter)  # a part of the model may be compiled
            for name, parameter in unwrapped(model).named_parameters()
            if parameter.requires_grad or log != "gradients"
        ]
        if patterns := selection.patterns:
            named = [item for item in named if any(fnmatchcase(item[0], pattern) for pattern in patterns)]
            if not named:
                raise ConfigError(f"--wandb_watch_patterns={' '.join(patterns)} matches no parameter of the model.")
        fitting = MAX_HISTOGRAMS // (2 if log == "all" else 1)
        count = min(len(named), fitting, selection.max_tensors or fitting)
        self._parameters = [named[i * (len(named) - 1) // max(count - 1, 1)] for i in range(count)]
        if is_main and count < len(named):
            logger.warning(
                "W&B watches %d of %d parameters, at even distances: %d would fit into a row. "
                "See --wandb_watch_max_tensors; choose by name with --wandb_watch_patterns.",
                count,
                len(named),
                fitting,
            )

    def is_due(self, step: int) -> bool:
        """Whether the optimizer step that is being made, counted from 1, is one to observe."""
        return step % self._log_freq == 0

    @torch.no_grad()
    def observe(self, *, grad_scale: float = 1.0) -> dict[str, Histogram]:
        """
        Collective if parameters are sharded, else local: gradients/NAME, then parameters/NAME, in the model's order.

        Call it after the last backward of a step, before clipping and optimizer.step(). Gradients are divided by
        `grad_scale`, fp16's loss scale. Values that aren't finite don't count; a tensor that has no others, or that
        spans more than float32 can, is left out. {} on ranks other than the main one. It waits for the device once,
        if neither sparse gradients nor several kinds of tensors are among them.
        """
        sources = self._sources(grad_scale)
        if self._gradient_of is None:
            return self._drawn(list(sources))
        found: dict[str, Histogram] = {}
        for source in sources:  # one by one: all whole gradients at once are as large as the model
            found |= self._drawn([source])
        return found

    def _drawn(self, sources: list[_Source]) -> dict[str, Histogram]:
        batches: dict[tuple[Any, ...], list[_Source]] = defaultdict(list)
        for source in sources:
            batches[source.values.device, source.dtype, source.shards].append(source)
        tables = [_table(batch) for batch in batches.values()]
        if not self._is_main:
            return {}
        drawn: dict[str, Histogram | None] = {}
        for batch, table in zip(batches.values(), tables, strict=True):
            for source, (low, high), counts in zip(batch, *_fetched(*table), strict=True):
                drawn[source.key] = _histogram(low / source.scale, high / source.scale, counts, source.num_zeros)
        return {source.key: found for source in sources if (found := drawn[source.key]) is not None}

    def _sources(self, grad_scale: float) -> Iterator[_Source]:
        for name, parameter in self._parameters if self._log != "parameters" else ():
            gradient = parameter.grad if self._gradient_of is None else self._gradient_of(parameter)
            if gradient is not None and (self._is_main or is_cut(gradient)):
                yield _source(f"gradients/{name}", gradient, grad_scale)
        for name, parameter in self._parameters if self._log != "gradients" else ():
            with gathered([parameter]):  # until it is drawn
                if self._is_main or is_cut(parameter):
                    yield _source(f"parameters/{name}", parameter, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A tensor to draw: its key in the row, the values that are stored here, flat, and what belongs to them."""

    key: str
    values: torch.Tensor
    dtype: torch.dtype  # to compute in: wandb.watch's
    scale: float
    num_zeros: int  # that a sparse gradient doesn't store
    shards: tuple[ProcessGroup, ...]  # whose ranks hold the other parts


def _source(key: str, tensor: torch.Tensor, scale: float) -> _Source:
    tensor, shards = local_part(tensor)
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    in_memory = sorted(range(values.dim()), key=values.stride, reverse=True)  # so that flattening copies nothing
    return _Source(
        key=key,
        values=values.permute(in_memory).reshape(-1),
        dtype=torch.float64 if values.dtype == torch.float64 else torch.float32,
        scale=scale,
        num_zeros=tensor.numel() - values.numel(),
        shards=shards,
    )


def _table(batch: Sequence[_Source]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Collective over the shards of the batch: its ranges, [sources, 2], and counts, [sources, NUM_COLUMNS] int64.

    First the range of the finite values, then the counts within it: tensors of which each rank holds a part need no
    more than a reduction after each of the two.
    """
    values, dtype, shards = [source.values for source in batch], batch[0].dtype, batch[0].shards
    on_host = values[0].device.type == "cpu"
    low, high = (_host_range if on_host else _device_range)(values, dtype)
    for group in shards:
        all_reduce(low, ReduceOp.MIN, group)
        all_reduce(high, ReduceOp.MAX, group)
    if any(source.num_zeros for source in batch):
        has_zeros = torch.tensor([source.num_zeros > 0 for source in batch], device="cpu")
        has_zeros = to_device(has_zeros, low.device) & (low <= high)
        low, high = torch.where(has_zeros, low.clamp(max=0), low), torch.where(has_zeros, high.clamp(min=0), high)
    counts = (_host_counts if on_host else _device_counts)(values, low, high)
    for group in shards:
        all_reduce(counts, ReduceOp.SUM, group)
    return torch.stack((low, high), dim=1), counts


def _fetched(ranges: torch.Tensor, counts: torch.Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """Both as lists, by one transfer: the ranges travel as their bits."""
    bits = torch.int64 if ranges.dtype == torch.float64 else torch.int32
    table = torch.cat([ranges.view(bits).to(torch.int64), counts], dim=1).cpu()
    return table[:, :2].to(bits).view(ranges.dtype).tolist(), table[:, 2:].tolist()


def _histogram(low: float, high: float, counts: Sequence[int], num_zeros: int) -> Histogram | None:
    if low > high or high - low > torch.finfo(torch.float32).max:
        return None
    if low == high:
        values, bins = [float(sum(counts[:NOT_FINITE]))], torch.tensor([low, high], device="cpu").tolist()
    else:
        values = [float(count) for count in counts[:NUM_BINS]]
        values[-1] += counts[NUM_BINS]
        bins = torch.linspace(low, high, NUM_BINS + 1, device="cpu").tolist()
    if num_zeros:
        around_zero = (i for i, (start, end) in enumerate(pairwise(bins)) if start <= 0 < end)
        values[next(around_zero, -1)] += num_zeros
    return Histogram(values=values, bins=bins)


def _host_range(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest finite value of each, [tensors] each; inf and -inf where there is none."""
    low = torch.full((len(tensors),), math.inf, dtype=dtype)
    high = -low
    for i, tensor in enumerate(tensors):
        for block in torch.split(tensor, HOST_BLOCK):
            values = block.to(dtype)
            if not values.sum().isfinite():  # to look at each value takes longer than all the rest
                values = values[values.isfinite()]
            if values.numel():
                smallest, largest = values.aminmax()
                low[i], high[i] = torch.minimum(low[i], smallest), torch.maximum(high[i], largest)
    return low, high


def _device_range(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in few kernels, without waiting for them."""
    low = torch.full((len(tensors),), math.inf, dtype=dtype, device=tensors[0].device)
    high = -low
    for rows, owners in _packed(tensors, dtype):
        low.scatter_reduce_(0, owners, rows.nan_to_num(math.inf, math.inf, math.inf).amin(dim=1), "amin")
        high.scatter_reduce_(0, owners, rows.nan_to_num(-math.inf, -math.inf, -math.inf).amax(dim=1), "amax")
    return low, high


def _host_counts(tensors: Sequence[torch.Tensor], low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """How many values of each fall into each column, [tensors, NUM_COLUMNS] int64."""
    counts = torch.zeros(len(tensors), NUM_COLUMNS, dtype=torch.int64)
    # Neighbours use different counters: most values of a gradient fall into one bin, and would wait for each other.
    lanes = (torch.arange(4, dtype=torch.int16) * NUM_COLUMNS).repeat(HOST_BLOCK // 4)
    for i, tensor in enumerate(tensors):
        for block in torch.split(tensor, HOST_BLOCK):
            columns = _columns(block.to(low.dtype), low[i], high[i]).to(torch.int16).add_(lanes[: block.numel()])
            counts[i] += columns.bincount(minlength=4 * NUM_COLUMNS).view(4, NUM_COLUMNS).sum(dim=0)
    return counts


def _device_counts(tensors: Sequence[torch.Tensor], low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The same in few kernels, without waiting for them."""
    device = low.device
    counts = torch.zeros(len(tensors), NUM_COLUMNS, dtype=torch.int64, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    for rows, owners in _packed(tensors, low.dtype):
        columns = _columns(rows, low[owners, None], high[owners, None]).to(torch.int64)
        # Each row counts for itself first, so that few values wait for the same counter.
        columns += torch.arange(len(rows), device=device)[:, None] * NUM_COLUMNS
        found = torch.zeros(len(rows) * NUM_COLUMNS, dtype=torch.int32, device=device)
        found.scatter_add_(0, columns.flatten(), one.expand(columns.numel()))
        counts.index_add_(0, owners, found.view(len(rows), NUM_COLUMNS).to(torch.int64))
    return counts


def _columns(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The column of each value, to be rounded down: torch.histc's to the bit, as NUM_BINS is a power of two."""
    width = torch.where(low < high, high - low, 1)  # without a range all that is finite goes into the first
    return values.sub(low).div_(width).mul_(NUM_BINS).nan_to_num_(NOT_FINITE, NOT_FINITE, NOT_FINITE)


def _packed(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Copies, [rows, ROW] of DEVICE_CHUNK values or fewer, NaN after a tensor's last, and each row's tensor's index."""
    nan = torch.full((ROW,), math.nan, dtype=dtype, device=tensors[0].device)
    pieces: list[torch.Tensor] = []
    owners: list[int] = []

    def pack() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(pieces).view(-1, ROW), to_device(torch.tensor(owners, device="cpu"), nan.device)

    for i, tensor in enumerate(tensors):
        for piece in torch.split(tensor, DEVICE_CHUNK):
            num_rows = -(-piece.numel() // ROW)
            if owners and (len(owners) + num_rows) * ROW > DEVICE_CHUNK:
                yield pack()
                pieces, owners = [], []
            pieces += [piece.to(dtype), nan[: num_rows * ROW - piece.numel()]]
            owners += [i] * num_rows
    if owners:
        yield pack()


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside of DDP and torch.compile, in either order."""
    inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    return model if inner is None else unwrapped(inner)
