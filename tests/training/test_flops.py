"""Counted operations against published ones, and the peaks of devices."""

import pytest
import torch
from torch import nn

from galaxydist.models.build import build_model, freeze_backbone
from galaxydist.recipe.schema import ModelConfig
from galaxydist.training.throughput import activation_bytes, device_peak_flops, forward_flops, training_flops


@pytest.mark.parametrize(
    ("name", "gmacs"),
    # torchvision's table of models (resnet18, resnet50, vgg16_bn) and timm's (vit_small_patch16_224: 4.6).
    [("resnet18", 1.814), ("resnet50", 4.089), ("vit", 4.6)],
)
def test_counted_flops_match_published_values(name: str, gmacs: float) -> None:
    model = build_model(ModelConfig(name=name), 1000, 224)  # type: ignore[arg-type]
    assert forward_flops(model, 224) == pytest.approx(2e9 * gmacs, rel=0.005)
    assert training_flops(model, 224) == 3 * forward_flops(model, 224)


def test_flops_of_vgg16_match_the_published_value_without_its_classifier() -> None:
    """15.48 GMAC published, of which the classifier that is not built here has 0.12."""
    assert forward_flops(build_model(ModelConfig(name="vgg16"), 10, 224), 224) == pytest.approx(2e9 * 15.35, rel=0.005)


def test_flops_of_custom_cnn_match_a_count_by_hand() -> None:
    width, size = 4, 32
    model = build_model(ModelConfig(name="custom_cnn", width=width), 10, size)
    assert forward_flops(model, size) == 2 * _custom_cnn_macs(width, size, classes=10)


def _custom_cnn_macs(width: int, size: int, classes: int) -> int:
    side = size // 2
    macs = 25 * 3 * width * side**2 + 2 * 9 * width * width * side**2
    for stage in range(3):
        side //= 2
        n = width * 2**stage
        macs += (9 * n * 2 * n + 9 * (2 * n) ** 2 + n * 2 * n) * side**2
        macs += 2 * 9 * (2 * n) ** 2 * side**2
    return macs + 8 * width * classes


def test_training_flops_of_a_frozen_backbone_have_a_backward_pass_only_for_the_head() -> None:
    model = build_model(ModelConfig(name="resnet18"), 10, 64)
    forward = forward_flops(model, 64)
    freeze_backbone(model, ("fc",))
    assert training_flops(model, 64) == forward + 2 * (2 * 512 * 10)


def test_counting_flops_leaves_weights_mode_and_random_state_unchanged() -> None:
    model = build_model(ModelConfig(name="vit", drop_rate=0.1), 10, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    forward_flops(model, 64)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_is_counted_once_for_each_image_size() -> None:
    model, seen = build_model(ModelConfig(name="custom_cnn", width=4), 3, 32), []
    model.register_forward_hook(lambda *_: seen.append(1))
    numbers = [(forward_flops(model, size), activation_bytes(model, size), training_flops(model, size)) for size in (32, 32, 64)]
    assert len(seen) == 2 and numbers[0] == numbers[1]
    assert numbers[2][0] > 3 * numbers[0][0] and numbers[2][1] > 3 * numbers[0][1]


def test_flops_of_a_linear_layer_are_two_per_weight() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 16 * 16, 5)

        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.layer(images_BCHW.flatten(1))
            return logits

    assert forward_flops(Flat(), 16) == 2 * 3 * 16 * 16 * 5


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", True, 312.0),
        ("NVIDIA A100-PCIE-40GB", "no", True, 156.0),
        ("NVIDIA A100 80GB PCIe", "no", False, 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989.4),
        ("NVIDIA H100 PCIe", "fp16", True, 756.0),
        ("NVIDIA H200", "bf16", True, 989.4),
        ("NVIDIA B200", "bf16", True, 2250.0),
        ("NVIDIA L40S", "bf16", True, 362.05),
        ("NVIDIA L4", "fp16", True, 121.0),
        ("Tesla T4", "fp16", True, 65.0),
        ("Tesla V100-SXM2-32GB", "fp16", True, 125.0),
        ("Tesla V100-SXM2-32GB", "no", True, 15.7),
        ("NVIDIA GeForce RTX 4090", "bf16", True, 165.2),
        ("NVIDIA RTX A6000", "bf16", True, 154.8),
        # Slower than their namesakes, or without the format.
        ("Tesla V100-SXM2-32GB", "bf16", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, None),
        ("NVIDIA A10G", "bf16", True, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", True, None),
        ("NVIDIA H100 80GB HBM3", "fp64", True, None),
        ("AMD Instinct MI300X", "bf16", True, None),
    ],
)
def test_device_peak_flops_are_known_for_listed_gpus_and_none_for_others(
    name: str, precision: str, tf32: bool, teraflops: float | None
) -> None:
    expected = None if teraflops is None else pytest.approx(teraflops * 1e12)
    assert device_peak_flops(name, precision, tf32=tf32) == expected  # type: ignore[arg-type]
