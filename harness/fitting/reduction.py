"""The reduction of a step's gradients after all its backward passes, with an agreement that each rank has made them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from harness.distributed.ranks import gloo_group

MIB = 2**20
DDP_BUCKET_MB = 25  # torch's default


class LateReduction:
    """
    Averages gradients over the ranks once all of them have theirs, as DDP does within the backward pass.

    A rank that runs out of memory inside of DDP's own reduction would leave the others waiting there for ever.
    `bucket_mb` is how much is sent at once. Collective: making one makes a process group.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, *, bucket_mb: int) -> None:
        self.num_ranks = accelerator.num_processes
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.bucket_bytes = bucket_mb * MIB
        self._group = gloo_group(accelerator)  # of host memory: the agreement needs no word of the device
        self._have: list[int] = []

    def any_failed(self, failed: bool) -> bool:
        """Collective: whether a rank has failed in this step; waits for the other ranks' hosts, not for a device."""
        noted = [failed, *(each.grad is not None for each in self.parameters)]
        told = torch.tensor(noted, dtype=torch.uint8, device="cpu")
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self._group)
        any_failed, *self._have = told.tolist()
        return bool(any_failed)

    def reduce(self) -> None:
        """
        Collective: average the gradients, in place, after `any_failed` has said no.

        A weight that has a gradient on some ranks counts as zero on the others; where none has one it stays without.
        """
        for bucket in self._buckets():
            flat = torch.cat([each.reshape(-1) for each in bucket]).mul_(1 / self.num_ranks)
            torch.distributed.all_reduce(flat)
            means = torch.split(flat, [each.numel() for each in bucket])
            for gradient, mean in zip(bucket, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def _buckets(self) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients in the order of the weights, each time as many of one type as a bucket holds."""
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter, has_one in zip(self.parameters, self._have, strict=True):
            if not has_one:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            num_bytes = gradient.numel() * gradient.element_size()
            if bucket and (size + num_bytes > self.bucket_bytes or gradient.dtype != bucket[0].dtype):
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += num_bytes
        if bucket:
            yield bucket
