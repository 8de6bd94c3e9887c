"""d4_cnn: the same logits for all eight flips and quarter turns, and a kept kernel that is never an old one."""

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from galaxydist.models.build import build_model
from galaxydist.models.custom_cnn import CustomCNN
from galaxydist.models.d4_cnn import D4CNN, ORDER, D4Conv, D4Norm, Halve, inverse_products, make_even, transform
from galaxydist.models.param_groups import parameter_groups
from galaxydist.recipe.schema import ModelConfig

SIZES = (16, 17, 22, 33, 50, 80)


def build_trained(width: int = 16, dtype: torch.dtype = torch.float64) -> D4CNN:
    """As after training: no zero scale, no statistic of 0 or 1."""
    torch.manual_seed(1)
    model = D4CNN(5, width).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if "norm" in name else 0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.2)
    return model


def views(images_BCHW: Tensor) -> list[Tensor]:
    """The eight views, written down without the code under test."""
    return [torch.rot90(side, turns, (2, 3)) for side in (images_BCHW, images_BCHW.flip(3)) for turns in range(4)]


def turn_map(x: Tensor, u: int) -> Tensor:
    """A group feature map B x (8 F) x H x W of the image turned by u: each map turned, orientation g from u^-1 g."""
    x_BGFHW = x.unflatten(1, (ORDER, -1))
    return transform(x_BGFHW[:, list(inverse_products()[u])], u).flatten(1, 2)


def test_d4_transforms_form_a_group_of_8_elements() -> None:
    image = torch.arange(9).view(3, 3)
    products = inverse_products()
    assert len({tuple(transform(image, g).flatten().tolist()) for g in range(ORDER)}) == ORDER
    for g in range(ORDER):
        assert sorted(products[g]) == list(range(ORDER))
        for h in range(ORDER):
            assert torch.equal(transform(transform(image, products[g][h]), g), transform(image, h))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("size", SIZES)
def test_d4_cnn_logits_are_equal_for_all_8_views_but_not_for_shifted_images(size: int, mode: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = build_trained(dtype=dtype).train(mode == "train")
        images_BCHW = torch.randn(3, 3, size, size, dtype=dtype)
        logits = [model(view).detach() for view in views(images_BCHW)]
        assert max((found - logits[0]).abs().max() for found in logits) < tolerance
        assert (logits[0][0] - logits[0][1]).abs().max() > 100 * tolerance, "the images must matter"
        shifted_BK = model(images_BCHW.roll(3, dims=3)).detach()
        assert (shifted_BK - logits[0]).abs().max() > 10 * tolerance, "and where things are in them"


def test_d4_cnn_logits_of_rectangular_images_are_equal_for_all_8_views() -> None:
    model = build_trained().eval()
    images_BCHW = torch.randn(2, 3, 21, 38, dtype=torch.float64)
    for view in views(images_BCHW):
        torch.testing.assert_close(model(view), model(images_BCHW), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("u", range(ORDER))
def test_every_d4_layer_commutes_with_the_8_transforms(u: int, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2 * ORDER, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    norm = D4Norm(2).double()
    nn.init.normal_(norm.batch.weight)
    for layer in (D4Conv(2, 3, 3).double(), D4Conv(2, 3, 1).double(), norm, Halve()):
        torch.testing.assert_close(layer(turn_map(x, u)), turn_map(layer(x), u), rtol=0, atol=1e-12)
    lifting = D4Conv(3, 2, 6, stride=2, lifting=True).double()
    images_BCHW = make_even(torch.randn(2, 3, size, size, dtype=torch.float64))
    torch.testing.assert_close(lifting(transform(images_BCHW, u)), turn_map(lifting(images_BCHW), u), rtol=0, atol=1e-12)


def test_d4_conv_equals_equation_11_of_cohen_and_welling_2016() -> None:
    """Equation 11 of Cohen & Welling 2016, one output orientation and one input orientation at a time."""
    conv = D4Conv(2, 3, 3).double()
    x = torch.randn(1, 2 * ORDER, 7, 7, dtype=torch.float64)
    x_GBFHW = x.unflatten(1, (ORDER, 2)).transpose(0, 1)
    products = inverse_products()
    for g in range(ORDER):
        kernels = [transform(conv.weight[:, :, products[g][h]], g) for h in range(ORDER)]
        expected = sum(nn.functional.conv2d(x_GBFHW[h], kernels[h], padding=1) for h in range(ORDER))
        torch.testing.assert_close(conv(x)[:, g * 3 : g * 3 + 3], expected)


def test_d4_conv_refuses_kernel_and_stride_that_break_the_symmetry() -> None:
    for kernel, stride in ((3, 2), (4, 1)):
        with pytest.raises(AssertionError):
            D4Conv(1, 1, kernel, stride=stride)


def test_d4_conv_gradients_pass_gradcheck() -> None:
    conv = D4Conv(1, 2, 3).double()
    x = torch.randn(1, ORDER, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda weight: torch.func.functional_call(conv, {"weight": weight}, x), conv.weight)


@pytest.mark.parametrize("fields", [1, 3, 8])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_d4_norm_equals_batch_norm_over_all_orientations_of_a_field(fields: int, mode: str) -> None:
    torch.manual_seed(0)
    ours, theirs = D4Norm(fields).double(), nn.BatchNorm2d(fields).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.batch.state_dict())
    ours.train(mode == "train")
    theirs.train(mode == "train")
    x = (3 + torch.randn(2, ORDER * fields, 5, 4, dtype=torch.float64)).contiguous(memory_format=torch.channels_last)
    x_BCHW, x_BFPW = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = ours(x_BCHW)
    expected = theirs(x_BFPW.unflatten(1, (ORDER, fields)).transpose(1, 2).flatten(2, 3))
    expected = expected.unflatten(2, (ORDER, 5)).transpose(1, 2).flatten(1, 2)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    assert out.is_contiguous(memory_format=torch.channels_last)
    pairs = [(out, expected), (x_BCHW.grad, x_BFPW.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    pairs += list(zip(ours.buffers(), theirs.buffers(), strict=True))
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


def test_d4_norm_supports_bf16_input_and_a_replaced_batch_norm() -> None:
    """bf16 and synchronised twins go through torch's module itself."""
    norm = D4Norm(4)
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = norm(x)
    torch.testing.assert_close(norm(x.bfloat16()).float(), expected, rtol=0, atol=0.1)
    norm.batch = torch.nn.Sequential(norm.batch)
    torch.testing.assert_close(norm(x), expected)


def test_d4_cnn_under_bf16_autocast_has_finite_gradients() -> None:
    torch.manual_seed(0)
    model = D4CNN(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BK = model(torch.randn(2, 3, 32, 32))
        assert logits_BK.dtype == torch.bfloat16
        logits_BK.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.eval()(torch.randn(2, 3, 32, 32))


def _step(model: D4CNN) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=0.01)
    model(torch.randn(4, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def _load(model: D4CNN) -> None:
    torch.manual_seed(9)
    model.load_state_dict(D4CNN(5, 16).double().state_dict())


def _train_mode(model: D4CNN) -> None:
    """Changes that torch does not count (through .data) are seen at the next change of mode."""
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.train().eval()


@pytest.mark.parametrize("change", [_step, _load, _train_mode])
def test_the_kept_kernel_follows_the_weights(change: Callable[[D4CNN], None]) -> None:
    """The model stays in evaluation mode: nothing but the weights tells that they changed."""
    model = build_trained().eval()
    images_BCHW = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = model(images_BCHW)
    change(model)
    expected = model(images_BCHW).detach()  # with gradients nothing is kept
    with torch.no_grad():
        assert torch.equal(model(images_BCHW), expected)
    assert not torch.equal(before, expected)


def test_ema_model_evaluates_with_kernels_of_its_own_weights() -> None:
    model = build_trained()
    ema = ModelEmaV3(model, decay=0.5)
    images_BCHW = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            kept = ema.module.eval()(images_BCHW)
        _step(model.train())
        ema.update(model)
        fresh = D4CNN(5, 16).double()
        fresh.load_state_dict(ema.module.state_dict())
        with torch.no_grad():
            assert torch.equal(ema.module(images_BCHW), fresh.eval()(images_BCHW))
            assert not torch.equal(ema.module(images_BCHW), kept)


def test_d4_kernel_is_expanded_once_for_inference_and_not_deep_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = D4Conv(1, 1, 3).eval(), torch.randn(1, ORDER, 5, 5)
    expand, calls = D4Conv.expand, []

    def counted(self: D4Conv) -> Tensor:
        calls.append(1)
        return expand(self)

    monkeypatch.setattr(D4Conv, "expand", counted)
    with torch.inference_mode():
        conv(x)
    with torch.no_grad():
        conv(x)
    assert len(calls) == 1
    twin = copy.deepcopy(conv)
    assert twin._kept is None and conv._kept is not None
    conv.double()(x.double())  # other weights in another place
    conv.requires_grad_(False)
    conv(x.double())
    conv(x.double())
    assert len(calls) == 3
    for _ in range(2):
        conv.train()(x.double())
    assert len(calls) == 5


def test_kernel_cached_in_inference_mode_works_in_training_with_frozen_layers() -> None:
    model = build_trained(dtype=torch.float32).eval()
    model.stages.requires_grad_(False)
    images_BCHW = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        model(images_BCHW)
    model(images_BCHW).sum().backward()
    assert model.stem.conv.weight.grad is not None and model.stem.conv.weight.grad.abs().max() > 0


def test_d4_cnn_has_an_eighth_of_the_weights_and_saves_no_derived_buffers() -> None:
    model, plain = D4CNN(10), CustomCNN(10)
    assert sum(p.numel() for p in model.parameters()) == 347_714
    assert sum(p.numel() for p in plain.parameters()) == 2_780_586
    assert not [name for name in model.state_dict() if "index" in name or "kept" in name]
    # Equal channels: the expanded kernels are those of the plain network, but for the stem's 6 in place of 5 pixels.
    shapes = [conv.expand().shape for conv in model.modules() if isinstance(conv, D4Conv)]
    assert shapes[1:] == [conv.weight.shape for conv in plain.modules() if isinstance(conv, nn.Conv2d)][1:]


def test_d4_cnn_loaded_from_safetensors_gives_the_same_logits() -> None:
    model = build_model(ModelConfig(name="d4_cnn", width=16), 4, 32)
    twin = build_model(ModelConfig(name="d4_cnn", width=16), 4, 32)
    twin.load_state_dict(load(save(model.state_dict())))
    images_BCHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images_BCHW), twin.eval()(images_BCHW))
