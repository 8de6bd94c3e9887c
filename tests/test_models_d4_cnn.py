"""The eight views of an image have the same logits, whatever the weights; expanded kernels are never stale."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from galaxydist.models.custom_cnn import CustomCNN
from galaxydist.models.d4_cnn import D4CNN, FieldNorm, GroupConv2d, LiftingConv2d


def views(images_BCHW: Tensor) -> Iterator[Tensor]:
    """In the order of the elements of D4."""
    for mirrored in (images_BCHW, images_BCHW.flip(3)):
        for quarters in range(4):
            yield torch.rot90(mirrored, quarters, (2, 3))


def lively(dtype: torch.dtype = torch.float32, width: int = 16) -> D4CNN:
    """With weights and statistics that are not those of the start, where every branch is zero."""
    torch.manual_seed(1)
    model = D4CNN(5, width).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, FieldNorm):
                module.norm.running_mean.normal_(0, 0.1)
                module.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("size", [16, 33, 50, 64, 80])
@pytest.mark.parametrize("training", [False, True])
def test_all_eight_views_have_the_same_logits(dtype: torch.dtype, tolerance: float, size: int, training: bool) -> None:
    model = lively(dtype).train(training)
    images_BCHW = torch.randn(3, 3, size, size, dtype=dtype)
    with torch.no_grad():
        logits_VBK = torch.stack([model(view) for view in views(images_BCHW)])
    assert (logits_VBK - logits_VBK[0]).abs().max() < tolerance
    assert logits_VBK[0].std(dim=0).min() > 1e-3, "logits that are all alike prove nothing"


def test_a_plain_network_has_no_such_invariance() -> None:
    torch.manual_seed(1)
    model, images_BCHW = CustomCNN(5, 16).eval(), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        logits_VBK = torch.stack([model(view) for view in views(images_BCHW)])
    assert (logits_VBK - logits_VBK[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", [1, 3])
def test_layers_turn_and_reorder_their_maps_with_the_image(kernel: int) -> None:
    """Each transformation of the image turns every map alike and reorders the eight maps of each field alike."""
    torch.manual_seed(2)
    lift, layer = LiftingConv2d(3, 2, kernel=3).double(), GroupConv2d(2, 3, kernel=kernel).double()
    images_BCHW = torch.randn(1, 3, 9, 9, dtype=torch.float64)

    def fields(view: Tensor) -> Tensor:
        maps: Tensor = layer(lift(view).square()).detach()
        return maps.unflatten(1, (8, 3))

    upright = fields(images_BCHW)
    orders = []
    for number, view in enumerate(views(images_BCHW)):
        maps = fields(view)
        turned = list(views(upright[0]))[number]  # 8 x 3 x H x W, each map turned
        order = [next(g for g in range(8) if torch.allclose(maps[0, h], turned[g], atol=1e-10)) for h in range(8)]
        assert sorted(order) == list(range(8))
        orders.append(tuple(order))
    assert len(set(orders)) == 8 and orders[0] == tuple(range(8))


def test_gradients_of_the_expansion_are_those_of_plain_indexing() -> None:
    torch.manual_seed(3)
    layer = GroupConv2d(2, 3, kernel=3).double()
    weight_FIn = layer.weight.detach().flatten(2).requires_grad_()
    gradient = torch.randn(3, 2, 8 * 72, dtype=torch.float64)
    weight_FIn[:, :, layer.index].backward(gradient)
    expected = weight_FIn.grad
    assert expected is not None
    ordered = gradient.unflatten(2, (8, 8, 3, 3)).permute(2, 0, 3, 1, 4, 5).reshape(24, 16, 3, 3)
    layer.expand().backward(ordered)
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad.flatten(2), expected, atol=1e-12)


def test_kernels_are_expanded_once_for_evaluation_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively().eval()
    images_BCHW = torch.randn(2, 3, 32, 32)
    expansions = []
    expand = GroupConv2d.expand
    monkeypatch.setattr(GroupConv2d, "expand", lambda layer: expansions.append(layer) or expand(layer))
    layers = sum(isinstance(module, GroupConv2d) for module in model.modules())

    def fresh() -> Tensor:
        """What a model gives that has just got these weights."""
        other = D4CNN(5, 16)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            return other.eval()(images_BCHW)

    with torch.inference_mode():
        model(images_BCHW)
        expansions.clear()
        first = model(images_BCHW)
    assert expansions == []
    average = copy.deepcopy(model)
    with torch.no_grad():  # as an optimizer or a moving average does
        for parameter in model.parameters():
            parameter.mul_(1.5)
        changed = model(images_BCHW)
    assert len(expansions) == layers
    assert torch.equal(changed, fresh()) and not torch.equal(changed, first)
    model.load_state_dict(average.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(images_BCHW), first)
    model.train()(images_BCHW).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.eval()(images_BCHW), fresh())
    nn.functional.cross_entropy(model(images_BCHW), torch.tensor([0, 1])).backward()  # in evaluation mode, with gradients


def test_an_image_in_group_normalisation_does_not_depend_on_those_beside_it() -> None:
    torch.manual_seed(4)
    images_BCHW = torch.randn(6, 3, 32, 32)
    grouped, batched = CustomCNN(5, 6, norm="group").double(), CustomCNN(5, 6).double()
    assert not list(grouped.buffers())
    for model, alone in ((grouped, True), (batched, False)):
        together = model(images_BCHW.double())
        assert torch.allclose(model(images_BCHW[:2].double()), together[:2], atol=1e-10) == alone
