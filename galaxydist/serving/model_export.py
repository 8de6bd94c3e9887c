"""Export of a trained model: an ONNX file, and an archive of ``torch.export``, both compared with PyTorch on galaxies.

The ONNX file has the input ``images`` (B x 3 x T x T, normalised, float32, any B) and the outputs of
``models.traced_outputs``. Neither file names a path of the machine that wrote it.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galaxydist.atomic_files import write_bytes
from galaxydist.errors import UserError, first_line
from galaxydist.loading.loader import DecodeOptions, EvalLoader
from galaxydist.loading.training_data import build_augment, has_split
from galaxydist.models.build import evaluation_mode
from galaxydist.models.features import extract_features
from galaxydist.models.registry import architecture_of
from galaxydist.models.saliency import GRAD_CAM, attention_rollout, grad_cam
from galaxydist.models.traced_outputs import EMBEDDING, LOGITS, SALIENCY, TracedOutputs, trace, trace_outputs
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.trained_model import TrainedModel
from galaxydist.serving.app.onnx_runtime import import_onnxruntime
from galaxydist.serving.app.published_model import SALIENCY_SIZE
from galaxydist.version import __version__

logger = logging.getLogger(__name__)

# The newest operators that torch writes; onnxruntime 1.24 reads them.
OPSET = 23
# Largest difference to PyTorch of an output whose values are up to 1; for larger values, times the largest one.
TOLERANCE = 1e-4
# Galaxies on which an export is compared with PyTorch: all at once, and the first alone.
NUM_CHECKED = 8
# A protocol buffer, and so an ONNX file, has at most 2 GiB; the graph itself needs little.
MAX_BYTES = (1 << 31) - (1 << 24)
# Loggers of the exporters, whose notes are about their own work.
_LOUD = ("torch", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class OnnxExport:
    """Result of an export to ONNX.

    Args:
        saliency: method of the output ``saliency``; None: the file has none.
        max_difference: largest difference of the logits to PyTorch's, divided by the largest logit if that is above 1.
    """

    saliency: str | None
    max_difference: float


def export_onnx(trained: TrainedModel, path: Path, metadata: Mapping[str, str], images_BCHW: Tensor | None = None) -> OnnxExport:
    """Write a model as an ONNX file of float32 weights, and compare it with PyTorch.

    Args:
        trained: the model, which does not change.
        path: the new file.
        metadata: properties of the file, in addition to those of the saliency map and of the versions.
        images_BCHW: normalised galaxies to compare on; None: simulated ones.

    Raises:
        UserError: the model cannot be exported, is larger than 2 GiB, or gives other outputs in onnxruntime.
    """
    model = _plain_copy(trained.model)
    name = trained.recipe.model.name
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"{name} has weights of {num_bytes / 2**30:.1f} GiB, and an ONNX file holds 2 GiB: publish without it (--no-onnx)"
        )
    images_BCHW = checked_galaxies(trained) if images_BCHW is None else images_BCHW
    try:
        with _quiet():
            traced, program = _convert(trained, model)
    except Exception as error:  # a model may raise anything
        raise UserError(
            f"{name} cannot be exported to ONNX ({type(error).__name__}: {_last_reason(error)}): publish without it (--no-onnx)"
        ) from error
    notes = {**metadata, "torch": torch.__version__, "galaxydist": __version__}
    if traced.saliency is not None:
        notes |= {"saliency": traced.saliency, SALIENCY_SIZE: json.dumps(list(traced.covered))}
    data = _serialise(program, notes)
    difference = _compare_onnx(data, trained, model, traced, images_BCHW)
    write_bytes(path, data)
    return OnnxExport(traced.saliency, difference)


def export_program(trained: TrainedModel, path: Path, images_BCHW: Tensor | None = None) -> float:
    """Write a model, from normalised images to logits, as an archive of ``torch.export``, and compare it with PyTorch.

    Args:
        trained: the model, which does not change.
        path: the new file; the torch version that reads it must know the operations of this one.
        images_BCHW: normalised galaxies to compare on; None: simulated ones.

    Returns:
        The largest difference of the logits, divided by the largest logit if that is above 1.

    Raises:
        UserError: the model cannot be traced, or the archive gives other logits.
    """
    model, size = _plain_copy(trained.model), trained.recipe.data.image_size
    images_BCHW = checked_galaxies(trained) if images_BCHW is None else images_BCHW
    buffer = io.BytesIO()
    try:
        with _quiet(), evaluation_mode(model), torch.no_grad():
            program = trace(model, torch.zeros(2, 3, size, size))
            program.example_inputs = None  # half a megabyte of zeros
            torch.export.save(program, buffer)
            loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    except Exception as error:  # a model may raise anything
        raise UserError(
            f"{trained.recipe.model.name} cannot be exported by torch.export ({type(error).__name__}: {_last_reason(error)}): "
            "publish without it (--no-program)"
        ) from error
    worst = 0.0
    with evaluation_mode(model), torch.no_grad():
        for some_BCHW in (images_BCHW, images_BCHW[:1]):
            found_BK, expected_BK = loaded(some_BCHW).numpy(), model(some_BCHW).numpy()
            worst = max(worst, _check("the torch.export archive", LOGITS, found_BK, expected_BK, "--no-program"))
    write_bytes(path, buffer.getvalue())
    return worst


def checked_galaxies(
    trained: TrainedModel, environ: Mapping[str, str] | None = None, trained_on: str | Path | None = None
) -> Tensor:
    """Return galaxies to compare on, normalised, float32: of the validation split, or simulated ones if there is none.

    Args:
        trained: the model.
        environ: names the data root of the shards; None: simulate.
        trained_on: path or URL of the shards, if they were moved.
    """
    stored = None if environ is None else _stored_galaxies(trained, environ, trained_on)
    pixels_BHWC = _simulated_galaxies(trained) if stored is None else stored
    normalise = build_augment(trained.recipe, trained.trained_on, threads=1).normalise
    return normalise(torch.from_numpy(pixels_BHWC))


def _stored_galaxies(
    trained: TrainedModel, environ: Mapping[str, str], trained_on: str | Path | None
) -> NDArray[np.uint8] | None:
    data = trained.recipe.data
    try:
        manifest = trained.open_shards(environ, trained_on)
        if not has_split(manifest, "val"):
            return None
        decode = DecodeOptions.of(data, threads=1, pin=False)
        with EvalLoader(manifest, "val", batch_size=NUM_CHECKED, decode=decode) as loader:
            batch = next(loader)
    except UserError as error:
        logger.debug("no validation galaxies to compare on: %s", error)
        return None
    return np.ascontiguousarray(batch.images_BHWC[batch.weights_B != 0].numpy())


def _simulated_galaxies(trained: TrainedModel) -> NDArray[np.uint8]:
    from galaxydist.surveys.simulate.survey import draw_slab, plan_survey

    images_BHWC, _, _ = draw_slab(plan_survey(NUM_CHECKED, seed=0, balanced=True), 0, NUM_CHECKED)
    form = ImageForm.of(trained.stored, trained.recipe.data, resize=True)
    return np.stack([form.prepare(image_HWC, "a simulated galaxy") for image_HWC in images_BHWC])


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return the model if it is in float32 on the CPU, else such a copy."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    if all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors):
        return model
    return copy.deepcopy(model).to("cpu", torch.float32)


def _convert(trained: TrainedModel, model: nn.Module) -> tuple[TracedOutputs, Any]:
    """Return the traced outputs and torch's ONNX program, without a saliency map if that cannot be exported."""
    architecture, size = architecture_of(trained.recipe.model, model), trained.recipe.data.image_size
    for saliency in (True, False):
        try:
            traced = trace_outputs(model, architecture, size, saliency=saliency)
            program = torch.onnx.export(
                traced.program,
                dynamic_shapes=({0: "batch"},),  # for the name
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(traced.names),
            )
        except Exception as error:  # a model may raise anything
            if not saliency:
                raise
            logger.debug("no saliency map in the exported file: %s: %s", type(error).__name__, _last_reason(error))
            continue
        return traced, program
    raise AssertionError("the last attempt returns or raises")


def _serialise(program: Any, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of an ONNX file, without the exporter's notes, which name source files of this machine."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    model = program.model
    ClearMetadataAndDocStringPass()(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    data: bytes = onnx_ir.to_proto(model).SerializeToString()
    return data


def _compare_onnx(data: bytes, trained: TrainedModel, model: nn.Module, traced: TracedOutputs, images_BCHW: Tensor) -> float:
    """Compare an ONNX file with PyTorch: logits, embedding, and the saliency maps as ``models.saliency`` computes them.

    Returns:
        The scaled difference of the logits.

    Raises:
        UserError: a difference above ``TOLERANCE``, or onnxruntime does not run the file.
    """
    worst = 0.0
    try:
        session = _open_session(data)
        batches = [images_BCHW, images_BCHW[:1]] if len(images_BCHW) > 1 else [images_BCHW]
        answers = [session.run(list(traced.names), {"images": some_BCHW.numpy()}) for some_BCHW in batches]
    except Exception as error:  # onnxruntime's errors have no common base
        raise UserError(
            f"{trained.recipe.model.name}: onnxruntime does not run the exported file ({_last_reason(error)}): publish without "
            "it (--no-onnx)"
        ) from error
    with evaluation_mode(model), torch.no_grad():
        for some_BCHW, found in zip(batches, answers, strict=True):
            expected = [model(some_BCHW), extract_features(model, some_BCHW)]
            if traced.saliency is not None:
                labels_B = expected[0].argmax(dim=1)
                expected.append(_maps(trained, model, traced.saliency, some_BCHW, labels_B))
                found[2] = found[2][np.arange(len(labels_B)), labels_B if traced.saliency == GRAD_CAM else 0]
            for name, found_B, expected_B in zip((LOGITS, EMBEDDING, SALIENCY), found, expected, strict=False):
                difference = _check("the ONNX file", name, found_B, expected_B.numpy(), "--no-onnx")
                worst = max(worst, difference if name == LOGITS else 0.0)
    return worst


def _maps(trained: TrainedModel, model: nn.Module, method: str, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    if method != GRAD_CAM:
        return attention_rollout(model, images_BCHW)
    last_map = architecture_of(trained.recipe.model, model).last_map
    assert last_map is not None, "Grad-CAM needs it"
    with torch.enable_grad():
        return grad_cam(model, model.get_submodule(last_map), images_BCHW, labels_B)


def _open_session(data: bytes) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised too
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _check(what: str, output: str, found: NDArray[Any], expected: NDArray[Any], option: str) -> float:
    """Return the largest difference, divided by the largest expected value if that is above 1.

    Raises:
        UserError: it is above ``TOLERANCE``, or not a number.
    """
    is_alike = found.shape == expected.shape
    difference = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max())) if is_alike else np.inf
    if not difference <= TOLERANCE:
        raise UserError(
            f"{what} does not give PyTorch's {output}: they differ by {difference:.1e}, and {TOLERANCE:.0e} is allowed (of the "
            f"largest value, if it is above 1). Publish without it ({option})"
        )
    return difference


def _last_reason(error: BaseException) -> str:
    """Return the first line of the innermost cause: the exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextmanager
def _quiet(names: Sequence[str] = _LOUD) -> Iterator[None]:
    """Silence the warnings and notes of the exporters."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [found.level for found in loggers]
    for found in loggers:
        found.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for found, level in zip(loggers, levels, strict=True):
            found.setLevel(level)
