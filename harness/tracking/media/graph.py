"""The layers of a model in the summary of a W&B run, as `wandb.watch(log_graph=True)` has them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from harness.distributed.sharding import whole_shape
from harness.tracking.media.histograms import unwrapped

logger = logging.getLogger(__name__)


def log_graph(run: Any, model: torch.nn.Module) -> None:
    """
    Put the layers of the prepared model into the summary of a W&B run, as graph_0: `wandb.watch(log_graph=True)`.

    After the first forward of the training, with the shapes of the outputs; at once and without them if anything is
    compiled, since hooks would break up what the compiler sees. It warns where it fails, and never raises.
    """
    plain = unwrapped(model)
    layers: dict[torch.nn.Module, str] = {}
    for name, layer in _layers(plain):
        layers.setdefault(layer, name)
    shapes: dict[torch.nn.Module, Any] = {}
    marks = ("_orig_mod", "_compiled_call_impl")  # of torch.compile(model) and of model.compile()
    if any(getattr(part, mark, None) is not None for part in model.modules() for mark in marks):
        _store_graph(run, layers, shapes)
        return

    def keep(layer: torch.nn.Module, _: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # it may be compiled later on
            shapes.setdefault(layer, _shape(output if isinstance(output, tuple) else (output,)))

    def finish(*_: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for hook in hooks:
                hook.remove()
            _store_graph(run, layers, shapes)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    hooks.append(plain.register_forward_hook(finish))


def _layers(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """What wandb.watch takes for layers: the children, and those of a container in its place."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Sequential | torch.nn.ModuleList | torch.nn.ModuleDict):
            yield from _layers(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _shape(output: Any) -> Any:
    """The shapes of the tensors that a layer returns, nested as they are."""
    if isinstance(output, torch.Tensor):
        return list(output.shape)
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [_shape(item) for item in items]


def _store_graph(run: Any, layers: Mapping[torch.nn.Module, str], shapes: Mapping[torch.nn.Module, Any]) -> None:
    """In the order in which the layers were done, those that weren't called last."""
    from wandb.data_types import Graph, Node

    graph = Graph("torch")
    try:
        for layer in dict.fromkeys([*shapes, *layers]):
            parameters = [(name, list(whole_shape(parameter))) for name, parameter in layer.named_parameters()]
            node = Node(id(layer), layers[layer], str(layer), parameters=parameters, output_shape=shapes.get(layer))
            node.num_parameters = [math.prod(shape) for _, shape in parameters]
            graph.add_node(node)
        run.summary["graph_0"] = graph
    except Exception as error:  # any: the layers describe themselves here, and wandb's service may be gone
        logger.warning("The model's layers could not be recorded in W&B: %s: %s", type(error).__name__, error)
