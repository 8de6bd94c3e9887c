"""Graph of a model's logits, embedding and saliency map for export: plain operations, without automatic differentiation.

``torch.export`` cannot trace a gradient. So the model is traced first, the part of its graph behind the last feature map (the
head) is differentiated on its own, and the operations of that gradient are appended to the graph. The map is Grad-CAM as
``models.saliency`` computes it, for every class at once; for a linear head behind an average it is the positive part of the
head's weights times the map, over the number of the map's pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from galaxydist.models.build import evaluation_mode
from galaxydist.models.features import forward_with_features
from galaxydist.models.registry import Architecture
from galaxydist.models.saliency import (
    GRAD_CAM,
    ROLLOUT,
    FeatureLayout,
    NoMapError,
    attention_rollout,
    patch_size,
    recorded_attention,
    roll_out,
)

LOGITS, EMBEDDING, SALIENCY = "logits", "embedding", "saliency"
# Notes of the tracer in a graph's nodes that name files of this machine.
_PATHS_IN_NODES = ("stack_trace", "fwd_source_fn_stack", "custom")


@dataclass(frozen=True)
class TracedOutputs:
    """A traced model.

    Args:
        program: from images B x 3 x T x T, normalised, float32, to ``LOGITS`` B x K, ``EMBEDDING`` B x D and, with a method,
            ``SALIENCY`` B x M x h x w; B is free.
        saliency: ``GRAD_CAM`` (M = K: unscaled evidence of each class), ``ROLLOUT`` (M = 1: shares of the patches) or None.
        covered: height and width in pixels that the saliency map covers: the image, or more than it if a ViT pads it.
    """

    program: ExportedProgram
    saliency: str | None
    covered: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""
        return (LOGITS, EMBEDDING) if self.saliency is None else (LOGITS, EMBEDDING, SALIENCY)


def trace_outputs(model: nn.Module, architecture: Architecture, image_size: int, *, saliency: bool = True) -> TracedOutputs:
    """Trace a model's outputs; the model and its mode do not change.

    Args:
        model: float32, on the CPU.
        architecture: from ``architecture_of``.
        image_size: T, pixels.
        saliency: False: without a saliency map.

    Raises:
        UserError: the model has no embedding.
        Exception: of any kind, from ``torch.export``: the model or its saliency map cannot be traced.
    """
    images_BCHW = torch.zeros(2, 3, image_size, image_size)
    with evaluation_mode(model), torch.no_grad(), _plain_attention(model):
        method = _find_method(model, architecture, images_BCHW) if saliency else None
        wrapped = _Outputs(model, architecture.last_map if method == GRAD_CAM else None, has_rollout=method == ROLLOUT)
        program = trace(wrapped.eval(), images_BCHW)
        covered = image_size, image_size
        if method == GRAD_CAM:
            _append_grad_cam(program, model, images_BCHW)
        elif method == ROLLOUT:
            patches = _outputs(program)[2].meta["val"].shape[2:]
            height, width = (int(count) * size for count, size in zip(patches, patch_size(model), strict=True))
            covered = height, width
    return TracedOutputs(program, method, covered)


def trace(module: nn.Module, images_BCHW: Tensor) -> ExportedProgram:
    """Trace a module for any number of images, without notes of this machine's files.

    Raises:
        Exception: of any kind, from ``torch.export``.
    """
    batch = torch.export.Dim("batch", min=1)
    program: ExportedProgram = torch.export.export(module, (images_BCHW,), dynamic_shapes=({0: batch},), strict=False)
    program = program.run_decompositions({})  # no operation in place, so that the graph can be cut
    for node in program.graph.nodes:
        for note in _PATHS_IN_NODES:
            node.meta.pop(note, None)
    return program


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch timm's fused attention off: its layout in memory differs from that of the operations that replace it in ONNX."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _find_method(model: nn.Module, architecture: Architecture, images_BCHW: Tensor) -> str | None:
    """Return the method that ``saliency.explain`` uses for the model."""
    try:
        attention_rollout(model, images_BCHW)
    except NoMapError:
        return None if architecture.last_map is None else GRAD_CAM
    return ROLLOUT


class _Outputs(nn.Module):
    """A model with its logits, embedding, and rollout or last feature map as outputs."""

    def __init__(self, model: nn.Module, last_map: str | None, *, has_rollout: bool) -> None:
        super().__init__()
        self.model, self.last_map, self.has_rollout = model, last_map, has_rollout

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            maps.append(output)
            return output.clone()  # an operation in place would change the map

        with ExitStack() as stack:
            if self.last_map is not None:
                stack.callback(self.model.get_submodule(self.last_map).register_forward_hook(keep).remove)
            weights = stack.enter_context(recorded_attention(self.model)) if self.has_rollout else []
            logits_BK, embedding_BD = forward_with_features(self.model, images)
        if self.has_rollout:
            return logits_BK, embedding_BD, roll_out(self.model, weights, images)[:, None]
        return logits_BK, embedding_BD, *maps[:1]


def _append_grad_cam(program: ExportedProgram, model: nn.Module, images_BCHW: Tensor) -> None:
    """Replace the last feature map, the third output of a program, by the Grad-CAM map of every class.

    Raises:
        NoMapError: the layer's output is no map of the image, the logits do not depend on it, or the traced gradient is of one
            number of images only.
        Exception: of any kind: an operation of the head has no gradient that could be traced.
    """
    graph = program.graph
    logits, embedding, last_map = _outputs(program)
    head = _nodes_between(graph, last_map, logits)
    given = list(dict.fromkeys(node for one in head for node in one.all_input_nodes if node not in head and node is not last_map))
    layout = FeatureLayout.of(model, last_map.meta["val"], images_BCHW)
    # The gradients of these operations have no ONNX; those of the simpler ones that they consist of have.
    simpler: dict[Any, Any] = {
        torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_average,
        torch.ops.aten._adaptive_avg_pool2d.default: _adaptive_average,
        torch.ops.aten.avg_pool2d.default: _average,
    }

    def run_head(values: Mapping[fx.Node, Any]) -> Tensor:
        known = dict(values)
        for node in head:
            inputs, options = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            operation: Any = simpler.get(node.target, node.target)
            known[node] = operation(*inputs, **options)
        logits_BK: Tensor = known[logits]
        return logits_BK

    def evidence(raw: Tensor, *others: Any) -> Tensor:
        known = dict(zip(given, others, strict=True))
        map_BChw = layout.to_map(raw)
        with_gradient: Any = torch.func.vjp(lambda mapped: run_head({**known, last_map: layout.back(mapped, raw)}), map_BChw)
        logits_BK, backward = with_gradient
        # One class after the other: the rules by which torch.func.vmap would take them together fix the number of images.
        classes_KK = torch.eye(logits_BK.shape[1])
        gradients = [backward(classes_KK[label].expand_as(logits_BK))[0] for label in range(len(classes_KK))]
        weights_BKC = torch.stack([gradient_BChw.mean(dim=(2, 3)) for gradient_BChw in gradients], dim=1)
        maps_BKN = torch.relu(weights_BKC @ map_BChw.flatten(2))
        return maps_BKN.reshape(*maps_BKN.shape[:2], *map_BChw.shape[2:])

    values = [node.meta["val"] for node in (last_map, *given)]
    with values[0].fake_mode:
        traced = _trace_gradient(evidence, values)
    if any(node.op == "get_attr" for node in traced.graph.nodes):
        raise NoMapError("its head has constants")
    if is_concrete_int(values[0].shape[0]):  # seen for a linear layer on tokens
        raise NoMapError("the gradient of its head fixes the number of images")
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), (last_map, *given), strict=True))
    output = graph.output_node()
    with graph.inserting_before(output):
        maps_BKhw = graph.graph_copy(traced.graph, copies)
    output.args = ((logits, embedding, maps_BKhw),)
    program.graph_signature.output_specs[2].arg.name = maps_BKhw.name
    graph.lint()
    program.graph_module.recompile()


def _outputs(program: ExportedProgram) -> tuple[Any, ...]:
    """Return the nodes of a program's outputs."""
    nodes: Any = program.graph.output_node().args[0]
    return tuple(nodes)


def _nodes_between(graph: fx.Graph, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Return the nodes on the paths from one node to another one, without the first, in the order of the graph."""
    behind = {start}
    for node in graph.nodes:
        if any(one in behind for one in node.all_input_nodes):
            behind.add(node)
    if end not in behind:
        raise NoMapError("the logits do not depend on its last map")
    found, waiting = set[fx.Node](), [end]
    while waiting:
        node = waiting.pop()
        if node in behind and node is not start and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in graph.nodes if node in found]


def _adaptive_average(map_BChw: Tensor, size: Sequence[int]) -> Tensor:
    """Return ``aten.adaptive_avg_pool2d`` of a map."""
    for axis, (count, side) in enumerate(zip(size, map_BChw.shape[2:], strict=True), start=2):
        edges = [(side * number // count, -(-side * (number + 1) // count)) for number in range(count)]
        map_BChw = _means(map_BChw, axis, edges)
    return map_BChw


def _average(
    map_BChw: Tensor, window: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (), *others: Any
) -> Tensor:
    """Return ``aten.avg_pool2d`` of a map, without padding."""
    if any(padding) or any(others[:1]) or any(others[2:]):
        raise NoMapError("its head pads a map for an average")
    sides = map_BChw.shape[2:]
    for axis, (size, step, side) in enumerate(zip(window, stride or window, sides, strict=True), start=2):
        map_BChw = _means(map_BChw, axis, [(start, start + size) for start in range(0, side - size + 1, step)])
    return map_BChw


def _means(x: Tensor, axis: int, edges: Sequence[tuple[int, int]]) -> Tensor:
    """Return the means over parts of an axis, start to stop, as the new axis."""
    return torch.stack([x.narrow(axis, start, stop - start).mean(dim=axis) for start, stop in edges], dim=axis)


def _trace_gradient(function: Callable[..., Tensor], values: Sequence[Any]) -> fx.GraphModule:
    """Trace a function that contains a gradient, with operations that every exporter knows."""
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    table: dict[Any, Any] = {
        **core_aten_decompositions(),
        **get_decompositions([aten.max_pool2d_with_indices_backward]),
        aten.convolution_backward.default: _convolution_backward,
    }
    traced = make_fx(function, decomposition_table=table)(*values)
    traced.graph.eliminate_dead_code()
    return traced


def _convolution_backward(gradient: Tensor, inputs: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, None, None]:
    """Return the gradient of a convolution's input: the transposed convolution of the output's gradient."""
    _, stride, padding, dilation, is_transposed, _, groups, _ = options
    if is_transposed:
        raise NoMapError("its head has a transposed convolution")
    missing = [
        size - ((out - 1) * step - 2 * pad + spread * (side - 1) + 1)
        for size, out, step, pad, spread, side in zip(
            inputs.shape[2:], gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    convolution = torch.ops.aten.convolution.default
    return convolution(gradient, weight, None, stride, padding, dilation, True, missing, groups), None, None
