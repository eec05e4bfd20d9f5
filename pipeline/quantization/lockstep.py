"""Run a prepared graph node by node, exact and rounded beside each other, for steps that go layer by layer."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx

from bitferry.pipeline.quantization.graph import is_grid, value
from bitferry.pipeline.quantization.grid import Grid

Value = Any
"""A weight, or a list with one value for each batch."""


class Lockstep:
    """All batches at one node, then at the next; values nobody needs any more are let go.

    `steps` stops at each node when its exact output is known and its rounded one is not, so that a step may change
    the node's weight and bias; the exact outputs are those before the change.
    """

    def __init__(self, model: fx.GraphModule, images: list[Tensor]) -> None:
        self.model, self.images = model, images
        self.exact: dict[fx.Node, Value] = {}
        self.rounded: dict[fx.Node, Value] = {}
        last = {given: node for node in model.graph.nodes for given in node.all_input_nodes}
        self.dead: dict[fx.Node, list[fx.Node]] = {}
        for given, node in last.items():
            self.dead.setdefault(node, []).append(given)

    def steps(self) -> Iterator[fx.Node]:
        """Go from node to node."""
        with torch.no_grad():
            for node in self.model.graph.nodes:
                if node.op == "output":
                    return
                self._compute_exact(node)
                yield node
                if not _is_leaf(node):
                    self.rounded[node] = self.rounded_outputs(node)
                for given in self.dead.get(node, []):
                    self.exact.pop(given, None)
                    self.rounded.pop(given, None)

    def rounded_outputs(self, node: fx.Node) -> Value:
        """Compute a node on what int8 gives it, once for each batch."""
        return self._computed(node, self.rounded, rounding=True)

    def _compute_exact(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.exact[node] = self.rounded[node] = list(self.images)
        elif node.op == "get_attr":
            self.exact[node] = self.rounded[node] = value(self.model, node)
        else:
            self.exact[node] = self._computed(node, self.exact, rounding=False)

    def _computed(self, node: fx.Node, known: dict[fx.Node, Value], *, rounding: bool) -> Value:
        many = [given for given in node.all_input_nodes if isinstance(known.get(given), list)]
        if not many:
            return self._call(node, known, None, rounding)
        return [self._call(node, known, batch, rounding) for batch in range(len(self.images))]

    def _call(self, node: fx.Node, known: dict[fx.Node, Value], batch: int | None, rounding: bool) -> Any:
        def pick(given: fx.Node) -> Any:
            found = known.get(given)
            return found[batch] if isinstance(found, list) and batch is not None else found

        arguments = cast(tuple[Any, ...], fx.node.map_arg(node.args, pick))
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if isinstance(module, Grid) and rounding:
                return module.rounded(arguments[0])
            return arguments[0] if is_grid(self.model, node) else None
        if _in_place(node) and isinstance(arguments[0], Tensor):
            arguments = (arguments[0].clone(), *arguments[1:])
        return cast(Any, node.target)(*arguments, **fx.node.map_arg(node.kwargs, pick))


def _is_leaf(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
