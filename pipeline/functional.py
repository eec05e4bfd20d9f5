"""A captured program without operators that write over their input: quantization and exporters lose such writes.

Most such operators write over a value that nothing else reads, as an in-place ReLU does; they become the operator that
returns its result. A write that something else sees, as through a view, needs PyTorch's functionalization, which puts
what was written into a new value (`slice_scatter`) for all that reads it later.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

aten = torch.ops.aten
DROPOUTS = {
    getattr(aten, f"{kind}dropout{place}").default for kind in ("", "feature_", "alpha_") for place in ("", "_")
}
COMPUTED = {
    f"aten::{name}"
    for name in (
        "adaptive_avg_pool2d", "avg_pool1d", "batch_norm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "cosine_similarity", "grid_sampler", "group_norm", "gru",
        "instance_norm", "layer_norm", "linear", "log_softmax", "lstm", "matmul", "max_pool2d", "one_hot", "prelu",
        "relu6", "rms_norm", "scaled_dot_product_attention", "selu", "softmax", "square", "upsample_bicubic2d",
        "upsample_bilinear2d", "upsample_nearest2d",
    )
}  # fmt: skip
"""Operators made of others that always give new memory."""
FOLDED_NORM = aten._native_batch_norm_legit_no_training.default
Export = Callable[[torch.nn.Module], torch.export.ExportedProgram]


def functional(program: torch.export.ExportedProgram, export: Export) -> torch.export.ExportedProgram:
    """Return a program of the same answers in which no operator writes over its input.

    `program` may be changed. `export` captures a module again as `program` was captured: it gives the nodes of the
    functionalized graph the names that an exported program usually has.
    """
    _drop_dropouts(program.graph)
    _return_results(program.graph)
    program.graph_module.recompile()
    if not any(_writes(node) for node in program.graph.nodes):
        return program
    # PyTorch keeps operators made of others whole, and takes what one gives for a new value.
    known = torch.export.default_decompositions()
    apart = {
        node.target: known[node.target] for node in program.graph.nodes if _may_alias(node) and node.target in known
    }
    module = cast(fx.GraphModule, program.run_decompositions(apart).module())
    restore_batch_norms(module)
    _drop_copies(module)
    return export(module)


def restore_batch_norms(module: fx.GraphModule) -> None:
    """Write the batch norms that functionalization takes apart as the operator that the model called."""
    for node in [node for node in module.graph.nodes if node.target is FOLDED_NORM]:
        results = list(node.users)
        if any(user.target is not operator.getitem or (user.args[1] and user.users) for user in results):
            continue
        *tensors, momentum, eps = node.args
        node.target, node.args = aten.batch_norm.default, (*tensors, False, momentum, eps, False)
        node.meta["val"] = cast(Sequence[Any], node.meta["val"])[0]
        for user in results:
            user.replace_all_uses_with(node)
            module.graph.erase_node(user)
    module.recompile()


def _drop_copies(module: fx.GraphModule) -> None:
    """Replace each copy into a tensor by what is copied, in that tensor's shape and type; a copy has no gradient."""
    for node in [node for node in module.graph.nodes if node.target is aten.copy.default]:
        into, source = node.args[:2]
        given, wanted = source.meta["val"], into.meta["val"]
        with module.graph.inserting_before(node):
            if given.dtype != wanted.dtype:
                source = module.graph.call_function(aten.to.dtype, (source, wanted.dtype))
            if given.shape != wanted.shape:
                source = module.graph.call_function(aten.expand_as.default, (source, into))
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    module.recompile()


def _drop_dropouts(graph: fx.Graph) -> None:
    """Erase the dropouts of evaluation mode, each of which gives its input."""
    for node in [node for node in graph.nodes if node.target in DROPOUTS and node.args[2:] == (False,)]:
        if not any(user.op == "output" for user in node.users):  # which the program's signature knows by name
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _return_results(graph: fx.Graph) -> None:
    """Replace each operator whose write nobody else sees by the one that returns its result."""
    for node in graph.nodes:
        plain = _returning(node)
        if plain is not None:
            node.target = plain


def _returning(node: fx.Node) -> Any | None:
    """Return the operator to take instead, where the input is a new value that no view and nothing later reads."""
    if not _writes(node):
        return None
    schema = cast(Any, node.target)._schema
    plain = getattr(aten, schema.name.removeprefix("aten::")[:-1], None)
    if not schema.name.startswith("aten::") or not hasattr(plain, schema.overload_name or "default"):
        return None
    written = [bool(one.alias_info and one.alias_info.is_write) for one in schema.arguments]
    given = next(iter(node.args), None)
    if written[:1] != [True] or any(written[1:]) or not isinstance(given, fx.Node) or not _is_new(given):
        return None
    if not all(other is node or (other < node and _is_new(other)) for other in given.users):
        return None
    return getattr(plain, schema.overload_name or "default")


def _writes(node: fx.Node) -> bool:
    """Return whether a node writes over one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and bool(schema is not None and schema.is_mutable)


def _is_new(node: fx.Node) -> bool:
    """Return whether a node's value shares no memory with another's, as the operator's schema says."""
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and not any(one.alias_info for one in schema.returns) and not _may_alias(node)


def _may_alias(node: fx.Node) -> bool:
    """Return whether a node may give its input, or a view of it, though its operator's schema is silent about it.

    So may an operator that is made of others (`type_as`, `einsum`, `dropout`), unless it is known to compute.
    """
    schema: Any = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or any(one.alias_info for one in schema.returns):
        return False
    name = f"{schema.name}.{schema.overload_name}".rstrip(".")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return bool(composite) and schema.name not in COMPUTED
