"""A published folder of the blobs that the app can open, and pictures of its test galaxies."""

import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from galaxydist.prediction.predictor import load_predictor
from galaxydist.serving.app.published_model import ONNX
from tests.helpers.published import PublishedRun


class _Outputs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        last = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
        hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        logits = self.model(images)
        hook.remove()
        return logits, kept[0]


def app_folder(run: PublishedRun, target: Path) -> Path:
    """A copy of the published folder, with an ONNX file."""
    shutil.copytree(run.folder, target)
    if not (target / ONNX).exists():
        trained = load_predictor(run.run_dir, {}, device="cpu").trained
        size = trained.recipe.data.image_size
        batch: Any = torch.export.Dim("batch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Outputs(trained.model.eval()),
                (torch.randn(2, 3, size, size),),
                target / ONNX,
                input_names=["images"],
                output_names=["logits", "embedding"],
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )
    return target


def galaxy_files(run: PublishedRun, target: Path) -> list[Path]:
    """The image files of the run's test galaxies."""
    files: list[Path] = []
    for shard in sorted(run.manifest.parent.glob("test-*.tar")):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith((".png", ".jpg"))]
            tar.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        files += [target / name for name in names]
    return files
