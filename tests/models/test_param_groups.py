"""Layer-wise decay of the rate: every architecture's layers in their order, each parameter once, no change without it."""

import pytest
import torch
from torch import nn

from galaxydist.models.build import build_model
from galaxydist.models.param_groups import layer_depths, no_decay_names, parameter_groups
from galaxydist.models.registry import ARCHITECTURES, MODEL_NAMES
from galaxydist.recipe.schema import ModelConfig, ModelName, OptimConfig
from galaxydist.training.optimizer import build_optimizer, set_learning_rate

# Stem, blocks (of a VGG: convolutions) and head.
LAYERS = {
    **{"custom_cnn": 9, "resnet18": 10, "resnet26": 10, "resnet50": 18, "vgg16": 14, "vgg19": 17, "vit": 14, "vit_scratch": 14},
    **{"reference_cnn": 6, "reference_vgg16": 14, "reference_vgg19": 17, "reference_vit": 8},
}


def build(name: ModelName, **settings: object) -> nn.Module:
    return build_model(ModelConfig.model_validate({"name": name, **settings}), 10, 32)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_layer_depths_decrease_from_input_to_head_for_every_model(name: ModelName) -> None:
    model = build(name)
    depths = layer_depths(model)
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert sorted(set(depths.values())) == [*range(LAYERS.get(name, max(depths.values()) + 1))]
    heads = tuple(f"{head}." for head in ARCHITECTURES[name].head)
    in_head = {key for key, depth in depths.items() if depth == 0}
    assert {key for key in depths if key.startswith(heads)} <= in_head <= {k for k in depths if k.startswith((*heads, "fc_norm"))}
    along = [depths[key] for key in dict(model.named_parameters()) if key not in ("norm.weight", "norm.bias")]
    assert along == sorted(along, reverse=True)


def test_norm_layers_have_the_depth_of_their_convolution() -> None:
    vgg, resnet = layer_depths(build("vgg16")), layer_depths(build("resnet18"))
    assert vgg["features.0.weight"] == vgg["features.1.weight"] == 13
    assert vgg["features.40.weight"] == vgg["features.41.bias"] == 1
    assert resnet["conv1.weight"] == resnet["bn1.weight"] == 9
    vit = layer_depths(build("vit"))
    assert vit["cls_token"] == vit["pos_embed"] == vit["patch_embed.proj.weight"] == 13
    assert vit["blocks.11.mlp.fc2.weight"] == vit["norm.weight"] == 1 and vit["head.bias"] == 0


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_layer_decay_gives_every_parameter_its_rate_scale_and_weight_decay(name: ModelName) -> None:
    model = build(name)
    depths, exempt = layer_depths(model), no_decay_names(model)
    places = {
        id(p): (group["weight_decay"], group["lr_scale"])
        for group in parameter_groups(model, 0.05, layer_decay=0.7)
        for p in group["params"]
    }
    for key, parameter in model.named_parameters():
        assert places.pop(id(parameter)) == (0.0 if key in exempt else 0.05, 0.7 ** depths[key])
    assert not places


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_layer_decay_of_1_gives_the_two_plain_parameter_groups(name: ModelName) -> None:
    model = build(name)
    decayed, exempt = parameter_groups(model, 0.05, layer_decay=1.0)
    assert decayed.keys() == exempt.keys() == {"params", "weight_decay"}
    names = no_decay_names(model)
    assert [id(p) for p in decayed["params"]] == [id(p) for key, p in model.named_parameters() if key not in names]
    assert [id(p) for p in exempt["params"]] == [id(p) for key, p in model.named_parameters() if key in names]


def test_frozen_backbone_with_layer_decay_leaves_only_head_groups() -> None:
    groups = parameter_groups(build("custom_cnn", freeze_backbone=True), 0.05, layer_decay=0.5)
    assert [(len(group["params"]), group["lr_scale"]) for group in groups] == [(1, 1.0), (1, 1.0)]


def test_learning_rate_of_a_step_is_scaled_for_each_layer() -> None:
    groups = [dict(group) for group in parameter_groups(build("vit"), 0.05, layer_decay=0.75)]
    optimizer = build_optimizer(groups, OptimConfig(lr=1.0), torch.device("cpu"))
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups[:2]] == pytest.approx([0.1 * 0.75**13] * 2)
    assert optimizer.param_groups[-1]["lr"] == 0.1
