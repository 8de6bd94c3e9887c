"""Features are what the head gets, of every kind of model."""

import pytest
import torch
from torch import Tensor, nn

from galaxydist.errors import UserError
from galaxydist.models.build import build_model
from galaxydist.models.features import extract_features
from galaxydist.recipe.schema import ModelConfig
from tests.helpers.model_names import marked

LINEAR_HEADS = ("custom_cnn", "d4_cnn", "resnet18", "vgg16", "vit", "vit_scratch", "reference_cnn", "reference_vit")


@pytest.mark.parametrize("name", marked(LINEAR_HEADS, ("custom_cnn", "d4_cnn", "resnet18", "vit", "reference_cnn")))
def test_head_of_the_features_gives_the_logits(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, drop_rate=0.5), 5, 64)
    images_BCHW = torch.randn(3, 3, 64, 64)
    features_BD = extract_features(model, images_BCHW)
    assert model.training, "the mode has not changed"
    assert features_BD.dtype == torch.float32 and not features_BD.requires_grad
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(head(features_BD), model.eval()(images_BCHW), rtol=1e-4, atol=1e-5)


def test_features_of_the_reference_vgg_are_the_mean_of_its_last_map() -> None:
    model = build_model(ModelConfig(name="reference_vgg16"), 5, 32).eval()
    images_BCHW = torch.randn(2, 3, 32, 32)
    kept: list[Tensor] = []
    model.get_submodule("features").register_forward_hook(lambda _, __, output: kept.append(output))
    torch.testing.assert_close(extract_features(model, images_BCHW), kept[-1].mean(dim=(2, 3)))


def test_features_of_a_head_on_tokens_are_their_mean() -> None:
    class OnTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 4, stride=4)
            self.head = nn.Linear(6, 5)

        def forward(self, images_BCHW: Tensor) -> Tensor:
            logits_BNK: Tensor = self.head(self.patches(images_BCHW).flatten(2).mT)
            return logits_BNK.mean(dim=1)

    model, images_BCHW = OnTokens(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.head(extract_features(model, images_BCHW)), model(images_BCHW))


def test_models_without_features_are_refused() -> None:
    class Pixels(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            return images_BCHW.mean(dim=(2, 3))

    class Unused(Pixels):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

    for model, words in ((Pixels(), "no linear layer"), (Unused(), "is not used")):
        with pytest.raises(UserError, match=words):
            extract_features(model, torch.zeros(2, 3, 8, 8))
