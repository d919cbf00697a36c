"""The layers of a model in the summary of a W&B run, as `wandb.watch(log_graph=True)` has them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from harness.distributed.sharding import whole_shape
from harness.tracking.media.histograms import unwrapped

logger = logging.getLogger(__name__)

NAME = "graph_0"  # wandb's, of the first model that is watched
MOST_MODULES = 5_000  # a tenth of a second, half a MB


def log_graph(run: Any, model: torch.nn.Module, *, with_shapes: bool = False, is_adopted: bool = False) -> None:
    """
    Put the layers of the prepared model into the summary of a W&B run, as graph_0: `wandb.watch(log_graph=True)`.

    At once, from names and shapes of the parameters, so that no training waits for it: a model of more modules than
    MOST_MODULES is cut to its layers' names, kinds and sizes. `with_shapes`: after the first forward of the training,
    with the shapes of the outputs; at once and without them if anything is compiled, since hooks would break up what
    the compiler sees. Each attempt sends it, since a killed one may not have got it through: the same layers make the
    same file. A run that is adopted, with a graph of its owner's, keeps that. It warns where it fails, never raises.
    """
    if is_adopted and NAME in run.summary.keys():  # noqa: SIM118 - wandb's summary has no `in`
        return
    plain = unwrapped(model)
    layers: dict[torch.nn.Module, str] = {}
    for name, layer in _layers(plain):
        layers.setdefault(layer, name)
    shapes: dict[torch.nn.Module, Any] = {}
    marks = ("_orig_mod", "_compiled_call_impl")  # of torch.compile(model) and of model.compile()
    if not with_shapes or any(getattr(part, mark, None) is not None for part in model.modules() for mark in marks):
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
        modules = (module for layer in layers for module in layer.modules())
        is_whole = sum(1 for _ in islice(modules, MOST_MODULES + 1)) <= MOST_MODULES
        for number, layer in enumerate(dict.fromkeys([*shapes, *layers])):
            node = Node(number, _bare(layers[layer]), output_shape=shapes.get(layer))
            (_describe if is_whole else _describe_shortly)(layer, node)
            graph.add_node(node)
        # What `run.summary[NAME] = graph` does, but for an import of pandas, which takes longer than all the rest.
        graph.bind_to_run(run, NAME, "summary")
        run.summary[NAME] = graph.to_json(run)
    except Exception as error:  # any: the layers describe themselves here, and wandb's service may be gone
        logger.warning("The model's layers could not be recorded in W&B: %s: %s", type(error).__name__, error)
        return
    if not is_whole:
        logger.info("W&B shows the layers of the model without what is in them: it has over %d modules.", MOST_MODULES)


def _describe(layer: torch.nn.Module, node: Any) -> None:
    """Give the node what wandb.watch gives it: the layer as it is printed, its parameters by name, and their sizes."""
    parameters = [(_bare(name), list(whole_shape(parameter))) for name, parameter in layer.named_parameters()]
    node.class_name, node.parameters = _text(layer), parameters
    node.num_parameters = [math.prod(shape) for _, shape in parameters]


def _describe_shortly(layer: torch.nn.Module, node: Any) -> None:
    """Give the node the kind of layer and the number of its parameters."""
    node.class_name = _kind(layer)
    node.num_parameters = [sum(math.prod(whole_shape(parameter)) for parameter in layer.parameters())]


def _bare(name: str) -> str:
    """The name without what compiling and checkpointing of a part put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _kind(layer: torch.nn.Module) -> str:
    """The name of a layer's class; FSDP2 makes a class of its own, FSDPLinear."""
    kind = type(layer).__name__
    return kind.removeprefix("FSDP") if isinstance(layer, FSDPModule) else kind


def _text(layer: torch.nn.Module) -> str:
    """The layer as it is printed, in the classes' own names."""
    text = str(layer)
    for kind in {type(part).__name__ for part in layer.modules() if isinstance(part, FSDPModule)}:
        text = re.sub(rf"\b{kind}\(", f"{kind.removeprefix('FSDP')}(", text)
    return text
