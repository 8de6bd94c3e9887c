"""Models by timm's names: built at the recipe's image size, with rates, head, weights and saliency; refused with the reason."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from galaxydist.errors import UserError
from galaxydist.models.build import build_model
from galaxydist.models.features import extract_features
from galaxydist.models.param_groups import layer_depths
from galaxydist.models.performance import checkpoint_activations
from galaxydist.models.registry import architecture_of
from galaxydist.models.saliency import GRAD_CAM, ROLLOUT, explain, grad_cam
from galaxydist.recipe.schema import ModelConfig

# timm's small models for tests: a transformer, a convolutional network, both together, and one with functional dropout.
SMALL = {
    "test_vit": ROLLOUT,
    "test_convnext": GRAD_CAM,
    "test_maxvit": GRAD_CAM,
    "test_efficientnet": GRAD_CAM,
}


def config_of(name: str, **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": f"timm/{name}", **settings})


def check_all(name: str, image_size: int, method: str | None, *, has_layers: bool = True) -> None:
    """Build, train, freeze, explain and take features of a model."""
    torch.manual_seed(0)
    config = config_of(name)
    model = build_model(config, 5, image_size)
    images_BCHW = torch.randn(2, 3, image_size, image_size)
    nn.functional.cross_entropy(model(images_BCHW), torch.tensor([0, 4])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    heads = {key for key, p in build_frozen(config, image_size).named_parameters() if p.requires_grad}
    classifier = timm.get_pretrained_cfg(name).classifier
    named = (classifier,) if isinstance(classifier, str) else classifier
    assert heads == {key for key, _ in model.named_parameters() if key.startswith(tuple(f"{one}." for one in named))}
    if has_layers:
        depths = layer_depths(model)
        assert max(depths.values()) >= 2 and all(depths[key] == 0 for key in heads)
    else:
        with pytest.raises(UserError, match="layer_decay"):
            layer_depths(model)
    features_BD = extract_features(model, images_BCHW)
    assert features_BD.ndim == 2 and features_BD.shape[0] == 2 and torch.isfinite(features_BD).all()
    found = explain(model, architecture_of(config, model), images_BCHW, torch.tensor([1, 2]))
    assert (found.method if found is not None else None) == method
    if found is not None:
        assert found.maps_BHW.shape == (2, image_size, image_size) and torch.isfinite(found.maps_BHW).all()
    if method == GRAD_CAM:
        layer = model.get_submodule(str(architecture_of(config, model).last_map))
        raw_Bhw = grad_cam(model, layer, images_BCHW, torch.tensor([1, 2]))
        assert raw_Bhw.shape[1] == raw_Bhw.shape[2], "not the channels"


def build_frozen(config: ModelConfig, image_size: int) -> nn.Module:
    return build_model(config.model_copy(update={"freeze_backbone": True}), 5, image_size)


@pytest.mark.parametrize(("name", "method"), SMALL.items())
def test_models_of_timm_train_and_have_head_layers_features_and_saliency(name: str, method: str) -> None:
    check_all(name, 64, method)


@pytest.mark.parametrize("name", SMALL)
def test_weights_for_another_image_size_and_number_of_classes_are_loaded(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    stored = build_model(config_of(name), 7, 96)
    save_file(stored.state_dict(), tmp_path / "w.safetensors")
    config = config_of(name, weights=tmp_path / "w.safetensors")
    own, known = build_model(config, 5, 64).state_dict(), stored.state_dict()
    same = {key for key in own if own[key].shape == known[key].shape and torch.equal(own[key], known[key])}
    resized = {key for key in own.keys() - same if "pos" in key}
    heads = {key for key in own if own[key].shape[:1] == (5,)}
    assert own.keys() - same == resized | heads and heads
    again = build_model(config, 7, 96).state_dict()
    assert all(torch.equal(again[key], known[key]) for key in known), "the head of as many classes is kept"


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    state = build_model(config_of("test_convnext"), 5, 64).state_dict()
    first = next(iter(state))
    save_file({key: tensor for key, tensor in state.items() if key != first}, tmp_path / "less.safetensors")
    save_file({**state, first: torch.full_like(state[first], float("nan"))}, tmp_path / "nan.safetensors")
    for name, words in (("less", rf"do not fit timm/test_convnext.*{first}"), ("nan", f"{first} have nan")):
        with pytest.raises(UserError, match=words):
            build_model(config_of("test_convnext", weights=tmp_path / f"{name}.safetensors"), 5, 64)


@pytest.mark.parametrize(
    ("name", "settings", "image_size", "words"),
    [
        ("test_convnet", {}, 64, "did you mean timm/test_convnext"),
        ("test_vit.r16", {}, 64, r"no such weights; did you mean timm/test_vit\.r160_in1k"),
        ("vgg11", {"drop_path_rate": 0.1}, 32, r"model\.drop_path_rate=0\.1: timm/vgg11 does not take this setting"),
        ("halonet26t", {}, 80, r"data\.image_size=80: .*set data\.image_size=256"),
        ("efficientformer_l1", {}, 64, r"data\.image_size=64: timm/efficientformer_l1 does not take images .*=224"),
    ],
)
def test_names_sizes_and_rates_that_timm_does_not_take_are_refused(
    name: str, settings: dict[str, float], image_size: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build_model(config_of(name, **settings), 5, image_size)


def test_rates_reach_the_model() -> None:
    for name in SMALL:
        model = build_model(config_of(name, drop_rate=0.4, drop_path_rate=0.3), 5, 64)
        rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)] + [getattr(model, "drop_rate", 0)]
        assert 0.4 in rates, name
        assert max(getattr(m, "drop_prob", 0) or 0 for m in model.modules()) > 0.1, name


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_gradient_checkpointing_of_timm_models_is_bit_equal(name: str) -> None:
    def gradients(*, is_checkpointed: bool) -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        model = build_model(config_of(name), 5, 64)
        if is_checkpointed:
            assert checkpoint_activations(model) > 1
        model(torch.ones(2, 3, 64, 64)).sum().backward()
        return [p.grad for p in model.parameters()]

    for plain, checkpointed in zip(gradients(is_checkpointed=False), gradients(is_checkpointed=True), strict=True):
        assert plain is not None and checkpointed is not None and torch.equal(plain, checkpointed)


# The smallest model of each of timm's families with at most 30 million parameters.
FAMILIES = {
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mnasnet_small",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_v3": "inception_v3",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "nest": "nest_tiny",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "flexivit_small",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
# Families whose smallest model is larger.
LARGE = {
    "beit",
    "deepseek_vit",
    "gemma4_vit",
    "inception_resnet_v2",
    "inception_v4",
    "mobilenetv5",
    "naflexvit",
    "nasnet",
    "nextvit",
    "pnasnet",
    "qwen3_vit",
    "selecsls",
    "tresnet",
    "vgg",
    "vision_transformer_sam",
}
# At 64 pixels, but for those whose layers allow no such size.
SIZES = {"byoanet": 256, "efficientformer": 224, "inception_v3": 96}
# timm's patterns give the layers no numbers: optim.layer_decay is refused.
WITHOUT_LAYERS = ("metaformer", "pit")
# Without a last feature in timm's list, or with one that is no map of the image.
WITHOUT_MAP = ("coat", "crossvit", "efficientvim", "hrnet", "mvitv2", "pit", "tnt", "twins")
ROLLED_OUT = ("deit", "eva", "vision_transformer", "vision_transformer_relpos")


@pytest.mark.nightly
def test_every_family_of_timm_is_known() -> None:
    """A family of a newer timm belongs into one of the lists above."""
    assert {name for name in timm.list_modules() if timm.list_models(module=name)} == {*FAMILIES, *LARGE}


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_smallest_model_of_every_family_trains_and_has_head_layers_features_and_saliency(family: str) -> None:
    method = None if family in WITHOUT_MAP else ROLLOUT if family in ROLLED_OUT else GRAD_CAM
    check_all(FAMILIES[family], SIZES.get(family, 64), method, has_layers=family not in WITHOUT_LAYERS)
