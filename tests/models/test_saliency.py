"""Saliency: Grad-CAM as autograd gives it, rollout as the product of matrices, and both find what decides."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galaxydist.models.build import build_model, freeze_backbone
from galaxydist.models.registry import ARCHITECTURES, MODEL_NAMES
from galaxydist.models.saliency import GRAD_CAM, ROLLOUT, Saliency, attention_rollout, explain, grad_cam
from galaxydist.recipe.schema import ModelConfig, ModelName
from tests.helpers.model_names import marked

TRANSFORMERS = ["vit", "vit_scratch", "reference_vit"]
CONVOLUTIONAL = [name for name in MODEL_NAMES if name not in TRANSFORMERS]
QUICK = set(MODEL_NAMES) - {"reference_vgg16", "reference_vgg19", "vgg19", "resnet50"}


def build(name: str, image_size: int = 64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, **options), 5, image_size).eval()  # type: ignore[arg-type]


def explained(model: nn.Module, name: str, images_BCHW: Tensor, targets_B: Tensor) -> Saliency:
    found = explain(model, ARCHITECTURES[name], images_BCHW, targets_B)
    assert found is not None
    return found


def spread(model: nn.Module) -> nn.Module:
    """Residual branches start at zero: give them something to do."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


@pytest.mark.parametrize("name", marked(CONVOLUTIONAL, QUICK))
def test_last_map_layer_comes_after_every_convolution(name: str) -> None:
    """No convolution comes after it, all come before; what follows only pools and classifies."""
    model = build(name)
    layer_name = ARCHITECTURES[name].last_map
    assert layer_name is not None
    order: list[str] = []
    shapes: list[torch.Size] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        order.append("map")
        shapes.append(output.shape)

    is_convolution = {id(module): hasattr(module, "weight") and module.weight.dim() >= 4 for module in model.modules()}
    for module_name, module in model.named_modules():
        if is_convolution[id(module)]:
            module.register_forward_hook(lambda *_: order.append("convolution"))
        if module_name == layer_name:
            module.register_forward_hook(keep)
    model(torch.randn(1, 3, 64, 64))
    assert order.count("map") == 1 and order[-1] == "map" and len(order) > 5
    assert len(shapes[0]) == 4 and min(shapes[0][2:]) >= 2
    if name.startswith(("vgg", "reference_vgg")):  # before the last pooling: 4 x 4 and not 2 x 2 of 64 pixels
        assert shapes[0][2:] == (4, 4)


@pytest.mark.parametrize("name", marked(CONVOLUTIONAL, QUICK))
@pytest.mark.parametrize("is_frozen", [False, True])
def test_grad_cam_equals_a_direct_autograd_computation(name: str, is_frozen: bool) -> None:
    model = spread(build(name))
    if is_frozen:
        freeze_backbone(model, ARCHITECTURES[name].head)
        model.eval()
    layer = model.get_submodule(str(ARCHITECTURES[name].last_map))
    images_BCHW, targets_B = torch.randn(5, 3, 64, 64), torch.arange(5)
    found_Bhw = grad_cam(model, layer, images_BCHW, targets_B)

    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().clone().requires_grad_())
        return kept[0].clone()

    with_hook = layer.register_forward_hook(keep)
    logits_BK = model(images_BCHW)
    with_hook.remove()
    (gradient_BChw,) = torch.autograd.grad(logits_BK.gather(1, targets_B[:, None]).sum(), kept[0])
    weights_BC = gradient_BChw.mean(dim=(2, 3))
    expected_Bhw = torch.einsum("bc,bchw->bhw", weights_BC, kept[0]).relu().detach()
    assert expected_Bhw.max() > 0
    torch.testing.assert_close(found_Bhw, expected_Bhw, rtol=1e-3, atol=1e-4 * float(expected_Bhw.max()))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("name", "image_size"), [("vit_scratch", 48), ("reference_vit", 60), ("vit", 40)])
def test_attention_rollout_equals_the_product_of_layer_attentions(name: str, image_size: int) -> None:
    model: Any = build(name, image_size)
    images_BCHW = torch.randn(2, 3, image_size, image_size)
    inputs: list[Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.blocks]
    with torch.no_grad():
        logits_BK = model(images_BCHW)
        for hook in hooks:
            hook.remove()
        product = None
        for block, tokens_BND in zip(model.blocks, inputs, strict=True):
            attention = block.attn
            batch, num_tokens, _ = tokens_BND.shape
            qkv = attention.qkv(tokens_BND).view(batch, num_tokens, 3, attention.num_heads, attention.head_dim)
            query, key = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
            weights = (query @ key.transpose(-1, -2) * attention.head_dim**-0.5).softmax(-1).mean(1)
            layer = 0.5 * weights + 0.5 * torch.eye(num_tokens)
            product = layer if product is None else layer @ product
    assert product is not None
    torch.testing.assert_close(product.sum(-1), torch.ones(product.shape[:2]))
    has_class_token = name != "vit_scratch"
    expected = product[:, 0, 1:] if has_class_token else product.mean(dim=1)
    patch = 25 if name == "reference_vit" else 16
    side = -(-image_size // patch)
    found_Bhw = attention_rollout(model, images_BCHW)
    assert found_Bhw.shape == (2, side, side)
    torch.testing.assert_close(found_Bhw.flatten(1), expected, rtol=1e-4, atol=1e-6)
    if not has_class_token:
        torch.testing.assert_close(found_Bhw.sum(dim=(1, 2)), torch.ones(2))
    # The model is left as it was: fused attention, no hook that goes on collecting.
    assert all(block.attn.fused_attn for block in model.blocks)
    assert all(not block.attn.attn_drop._forward_pre_hooks for block in model.blocks)
    with torch.no_grad():
        assert torch.equal(model(images_BCHW), logits_BK)


class TinyNetwork(nn.Module):
    """Two convolutions, a global average and a linear layer, named as in CustomCNN."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(self.stages(images_BCHW).mean(dim=(2, 3)))
        return logits_BK


def planted(count: int, size: int = 24) -> tuple[Tensor, Tensor, list[int]]:
    """Return images, classes and quadrants of noise with two squares.

    The channel of the square in the quadrant, first or last, is the class; a square of the middle channel in the opposite
    quadrant means nothing.
    """
    labels_B, chosen = torch.arange(count) % 2, (torch.arange(count) // 2 % 4).tolist()
    images_BCHW = 0.2 * torch.randn(count, 3, size, size)
    for image, label, quadrant in zip(images_BCHW, labels_B.tolist(), chosen, strict=True):
        for place, channel in ((quadrant, 2 * label), (3 - quadrant, 1)):
            row, column = (part * size // 2 + 3 for part in divmod(place, 2))
            image[channel, row : row + 6, column : column + 6] += 3
    return images_BCHW, labels_B, chosen


def in_quadrant(map_HW: Tensor, quadrant: int) -> float:
    """The share of a map that lies in a quadrant."""
    half = map_HW.shape[0] // 2
    row, column = divmod(quadrant, 2)
    return float(map_HW[row * half : (row + 1) * half, column * half : (column + 1) * half].sum() / map_HW.sum())


def test_grad_cam_of_a_trained_network_highlights_the_decisive_quadrant() -> None:
    torch.manual_seed(0)
    model, (images_BCHW, labels_B, _) = TinyNetwork(), planted(64)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images_BCHW), labels_B).backward()
        optimizer.step()
    new_BCHW, truth_B, chosen = planted(16)
    assert (model(new_BCHW).argmax(1) == truth_B).all()
    found = explained(model, "custom_cnn", new_BCHW, truth_B)
    shares = [in_quadrant(map_HW, quadrant) for map_HW, quadrant in zip(found.maps_BHW, chosen, strict=True)]
    assert min(shares) > 0.5, shares  # most of it, where chance gives a quarter
    assert model.training  # left as it was
    assert found.method == GRAD_CAM and found.maps_BHW.shape == (16, 24, 24)


def test_attention_rollout_finds_a_planted_patch() -> None:
    """Queries all alike, and keys that look for the planted patch's colour."""
    model: Any = build("reference_vit", 100)
    images_BCHW = torch.zeros(1, 3, 100, 100)
    images_BCHW[:, :, 25:50, 50:75] = 3.0  # patch (1, 2) of 4 x 4
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.weight[0] = 1 / (3 * 25 * 25)
        model.pos_embed.zero_()
        model.cls_token.zero_()
        for block in model.blocks:
            width = model.embed_dim
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
            block.attn.qkv.bias[:width] = 1.0  # queries
            block.attn.qkv.weight[width : 2 * width, 0] = 1.0  # keys
    found = explained(model, "reference_vit", images_BCHW, torch.tensor([0]))
    assert found.method == ROLLOUT and found.peaks_B[0] > 3
    top = int(found.maps_BHW[0].argmax())
    assert 25 <= top // 100 < 50 and 50 <= top % 100 < 75


@pytest.mark.parametrize(("name", "image_size"), [("custom_cnn", 50), ("d4_cnn", 33), ("resnet18", 64), ("vit_scratch", 50)])
def test_saliency_maps_have_the_image_size_and_values_between_0_and_1(name: ModelName, image_size: int) -> None:
    model = build(name, image_size, **({"width": 8} if name.endswith("cnn") else {}))
    found = explained(model, name, torch.randn(2, 3, image_size, image_size), torch.tensor([0, 3]))
    maps_BHW = found.maps_BHW
    assert maps_BHW.shape == (2, image_size, image_size) and maps_BHW.dtype == torch.float32
    for map_HW, peak in zip(maps_BHW, found.peaks_B.tolist(), strict=True):
        if peak == 0:
            assert not map_HW.any()
        else:
            assert map_HW.max() == pytest.approx(1) and map_HW.min() >= 0 and peak >= 1
    assert found.method == (ROLLOUT if name in TRANSFORMERS else GRAD_CAM)
    if name in TRANSFORMERS:
        assert maps_BHW.amin() == 0


def test_grad_cam_recognises_a_map_with_the_channels_last() -> None:
    class ChannelsLast(TinyNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.last_map = nn.Identity()

        def forward(self, images_BCHW: Tensor) -> Tensor:
            logits_BK: Tensor = self.head(self.last_map(self.stages(images_BCHW).permute(0, 2, 3, 1)).mean(dim=(1, 2)))
            return logits_BK

    model = ChannelsLast()
    for height, width in ((24, 24), (24, 32)):
        images_BCHW, targets_B = torch.randn(2, 3, height, width), torch.tensor([0, 1])
        found_Bhw, expected_Bhw = (grad_cam(model, layer, images_BCHW, targets_B) for layer in (model.last_map, model.stages))
        assert expected_Bhw.any()
        torch.testing.assert_close(found_Bhw, expected_Bhw)


def test_grad_cam_without_positive_evidence_is_a_map_of_zeros() -> None:
    model = TinyNetwork()
    with torch.no_grad():
        model.head.weight.fill_(-1)
    found = explained(model, "custom_cnn", torch.randn(1, 3, 24, 24), torch.tensor([1]))
    assert not found.maps_BHW.any() and found.peaks_B.tolist() == [0]


def test_d4_cnn_saliency_of_a_rotated_image_is_the_rotated_map() -> None:
    """Of a network that cannot tell them apart."""
    model = spread(build("d4_cnn", 64, width=8))
    images_BCHW, targets_B = torch.randn(1, 3, 64, 64).expand(5, -1, -1, -1), torch.arange(5)
    upright = explained(model, "d4_cnn", images_BCHW, targets_B).maps_BHW
    turned = explained(model, "d4_cnn", torch.rot90(images_BCHW, 1, (2, 3)), targets_B).maps_BHW
    assert upright.any()
    torch.testing.assert_close(torch.rot90(upright, 1, (1, 2)), turned, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "head"), [("custom_cnn", "head"), ("resnet18", "fc"), ("vgg16", "head.fc")])
def test_grad_cam_of_a_linear_head_is_its_weights_times_the_map_over_its_size(name: str, head: str) -> None:
    """Behind an average over the map; a maximum pooling between them passes each gradient on to one pixel."""
    model = spread(build(name))
    layer = model.get_submodule(str(ARCHITECTURES[name].last_map))
    maps: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, output: maps.append(output.detach().clone()))
    targets_B = torch.arange(5)
    found_Bhw = grad_cam(model, layer, torch.randn(5, 3, 64, 64), targets_B)
    weights_BC = model.get_parameter(f"{head}.weight")[targets_B].detach()
    expected_Bhw = torch.einsum("bc,bchw->bhw", weights_BC, maps[0]).relu() / maps[0][0, 0].numel()
    assert expected_Bhw.any()
    torch.testing.assert_close(found_Bhw, expected_Bhw, rtol=1e-4, atol=1e-6)
