"""Every recipe in recipes/ is parsed, is the small difference that it should be, is built, and takes two optimizer steps."""

from pathlib import Path

import pytest
import torch
from torch import nn

from galaxydist.models.build import build_model
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.registry import MODEL_NAMES, ModelRecord, recipe_of
from galaxydist.recipe.model_names import NAMED_MODELS
from galaxydist.recipe.resolve import ResolvedRecipe, list_recipes, load_recipe
from galaxydist.recipe.schema import Recipe
from galaxydist.training.optimizer import build_optimizer

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in RECIPES]
# The numbers of processes that the recipes are meant for.
WORLD_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24)

CPU_RECIPES = ("demo", "simulated_start", "small")


# Published encoders: recipe -> model.
ENCODERS = {
    "convnext_nano": "timm/convnext_nano.in12k_ft_in1k",
    "dinov2_small": "timm/vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov3_small": "timm/vit_small_patch16_dinov3.lvd1689m",
    "efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k",
    "maxvit_tiny": "timm/maxvit_tiny_tf_224.in1k",
    "zoobot_convnext_nano": "hf-hub:mwalmsley/zoobot-encoder-convnext_nano",
}
# The description that the repository of the hub states.
RECORDS = {ENCODERS["zoobot_convnext_nano"]: ModelRecord("convnext_nano", pretrained_cfg={"classifier": "head.fc"})}


def build_random(recipe: Recipe, image_size: int) -> nn.Module:
    config = recipe.model.model_copy(update={"pretrained": False})
    return build_model(config, 10, image_size, record=RECORDS.get(config.name))


def load(path: Path, *overrides: str) -> ResolvedRecipe:
    return load_recipe([f"recipe={path}", *overrides])


def test_shipped_recipes_are_one_per_model_those_of_the_small_network_and_reference_resnets() -> None:
    own = {recipe_of(name): name for name in NAMED_MODELS}
    others = dict.fromkeys(("demo", "simulated_start", "small"), "custom_cnn")
    others |= {f"reference/resnet{depth}": f"resnet{depth}" for depth in (18, 26, 50)}
    others |= ENCODERS
    assert sorted(NAMES) == sorted(own | others) == sorted(list_recipes())
    for name, path in zip(NAMES, RECIPES, strict=True):
        resolved = load(path)
        assert resolved.recipe.model.name == (own | others)[name]
        assert resolved.recipe.name == name.replace("/", "-")


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_shipped_recipe_is_short_and_sets_only_non_default_values(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert any(line.startswith("# Settings:") for line in lines), "where the settings come from"
    assert len([line for line in lines if line and not line.startswith("#")]) <= 22
    assert max(map(len, lines)) <= 130
    resolved = load(path)
    default = Recipe.model_validate({"name": resolved.recipe.name, "model": {"name": resolved.recipe.model.name}})
    for key, origin in resolved.origins.items():
        if str(path.name) in origin and key not in ("name", "model.name"):
            section, *rest = key.split(".")
            given, usual = getattr(resolved.recipe, section), getattr(default, section)
            for part in rest:
                given, usual = getattr(given, part), getattr(usual, part)
            assert given != usual, f"{path.name}: {key} is the schema's default"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_shipped_batch_sizes_divide_evenly_over_common_world_sizes(path: Path) -> None:
    """240 leaves out 7 processes, 24 and 48 leave out 5 and 7: ranks then differ by one galaxy, the numbers stay exact.

    All of 1 to 8, 12, 16 and 24 divide only multiples of 1,680, which is 8 steps an epoch of Galaxy10's 14,188 training galaxies.
    """
    batch_size = load(path).recipe.train.batch_size
    uneven = [world_size for world_size in WORLD_SIZES if batch_size % world_size]
    assert uneven == ([5, 7] if path.stem in ("demo", "simulated_start") else [5, 7, 16] if path.stem == "small" else [7])


def test_profiles_scale_rate_and_moving_average_with_the_batch() -> None:
    """Linear for SGD and by the square root for AdamW; the decay to the power of the ratio (sources: docs/training.md)."""
    with_profiles = [path for path in RECIPES if load(path).profiles]
    assert {path.stem for path in RECIPES if path.parent == FOLDER and path not in with_profiles} == set(CPU_RECIPES)
    for path in with_profiles:
        base, one, eight = (load(path, *words).recipe for words in ([], ["profile=1gpu"], ["profile=8gpu"]))
        assert (one.train.batch_size, one.optim, one.train.ema) == (base.train.batch_size, base.optim, base.train.ema)
        ratio = eight.train.batch_size / base.train.batch_size
        assert eight.train.batch_size % 8 == 0 and ratio == 4
        assert eight.optim.lr == pytest.approx(base.optim.lr * (ratio if base.optim.name == "sgd" else ratio**0.5))
        assert eight.train.ema == pytest.approx(base.train.ema**ratio, abs=5e-4)
        assert one.eval.batch_size == eight.eval.batch_size > base.eval.batch_size
        assert one.train.save_minutes == eight.train.save_minutes > 0


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_takes_two_steps(path: Path) -> None:
    """The recipe's model, optimizer, rate and smoothing; small images and a batch of two make it quick for the large ones too."""
    torch.manual_seed(0)
    recipe = load(path).recipe
    model = build_random(recipe, 32)
    groups = parameter_groups(model, recipe.optim.weight_decay, recipe.optim.layer_decay)
    optimizer = build_optimizer([dict(group) for group in groups], recipe.optim, torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        logits_BK = model(torch.randn(2, 3, 32, 32))
        loss = nn.functional.cross_entropy(logits_BK, torch.tensor([3, 7]), label_smoothing=recipe.train.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_runs_at_its_own_image_size(path: Path) -> None:
    recipe = load(path).recipe
    size = recipe.data.image_size
    model = build_random(recipe, size)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_every_registered_model_has_a_recipe() -> None:
    assert {load(path).recipe.model.name for path in RECIPES} == {*MODEL_NAMES, *ENCODERS.values()}
