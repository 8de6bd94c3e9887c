"""Models of a user's own function: built where the code is trusted, and one clear message for all that is wrong with it."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from galaxydist.errors import UserError
from galaxydist.models.build import build_model, describe_model
from galaxydist.models.features import extract_features
from galaxydist.models.own_function import check_source, copied_sources, source_hash, trusts_code
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.registry import architecture_of
from galaxydist.models.saliency import explain
from galaxydist.recipe.schema import ModelConfig

SOURCE = """
from torch import nn

def small(num_classes, image_size, drop_rate=0.0):
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate)]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))

def wrong_shape(num_classes, image_size):
    return small(num_classes + 1, image_size)

def no_module(num_classes, image_size):
    return {"classes": num_classes}

def fails(num_classes, image_size):
    sizes = {}
    return sizes[image_size]

def fails_later(num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(10, num_classes))

def one_argument(num_classes):
    return small(num_classes, 64)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the module ``own_nets`` and the package ``own_package``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(SOURCE)
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "nets.py").write_text(SOURCE)
    (tmp_path / "own_broken.py").write_text("x = 1\nimport no_such_library_here\n")
    (tmp_path / "own_syntax.py").write_text("def net(:\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    assert str(tmp_path) not in sys.path


def config_of(function: str, **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": function, **settings})


def test_own_model_is_built_frozen_grouped_and_has_features(folder: Path) -> None:
    config = config_of("own_nets:small", drop_rate=0.25, freeze_backbone=True)
    model = build_model(config, 5, 32, trust_code=True)
    images_BCHW = torch.randn(2, 3, 32, 32)
    assert model(images_BCHW).shape == (2, 5) and model.get_submodule("4").p == 0.25
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"5.weight", "5.bias"}
    assert len(parameter_groups(model, 0.05)) == 2
    assert extract_features(model, images_BCHW).shape == (2, 8)
    assert explain(model, architecture_of(config, model), images_BCHW, torch.tensor([0, 1])) is None
    expected = hashlib.sha256((folder / "own_nets.py").read_bytes()).hexdigest()
    assert describe_model(config, None).code == expected == source_hash("own_nets:small")


def test_code_is_not_imported_without_trust_nor_by_its_hash_and_files(folder: Path) -> None:
    config = config_of("own_package.nets:small")
    with pytest.raises(
        UserError, match=r"look at .*own_package/nets\.py, and give --trust-code \(or set GALAXYDIST_TRUST_CODE=1\)"
    ):
        build_model(config, 5, 32)
    check_source(config.name)
    assert source_hash(config.name) == source_hash("own_nets:small")
    assert copied_sources(config.name).keys() == {"own_package/__init__.py", "own_package/nets.py"}
    assert copied_sources("own_nets:small") == {"own_nets.py": folder / "own_nets.py"}
    assert copied_sources("torchvision.models:resnet18") == copied_sources("vit") == {}
    assert "own_package" not in sys.modules and "own_nets" not in sys.modules
    assert [trusts_code({"GALAXYDIST_TRUST_CODE": value}) for value in ("1", "0", "")] == [True, False, False]


@pytest.mark.parametrize(
    ("function", "settings", "words"),
    [
        ("own_nets:smal", {}, r"own_nets\.py has no function smal; its functions are small, wrong_shape, "),
        ("own_nettz:small", {}, r"there is no module own_nettz; it is searched in the current folder"),
        ("own_nets:wrong_shape", {}, r"returns \(2, 6\), and must return logits of \(2, 5\)"),
        ("own_nets:no_module", {}, r"returned dict, and must return a torch\.nn\.Module"),
        ("own_nets:fails", {}, r"your code failed with KeyError: 32 \(.*own_nets\.py, line \d+, in fails\)"),
        ("own_nets:fails_later", {}, r"does not take images of 2 x 3 x 32 x 32 \(RuntimeError: mat1 and mat2"),
        ("own_nets:one_argument", {}, r"your code failed with TypeError: one_argument\(\) takes 1 positional"),
        (
            "own_nets:small",
            {"drop_path_rate": 0.1},
            r"model\.drop_path_rate=0\.1: the function of own_nets:small has no parameter",
        ),
        ("own_broken:net", {}, r"ModuleNotFoundError: No module named 'no_such_library_here' \(.*own_broken\.py, line 2"),
        ("own_syntax:net", {}, r"SyntaxError: .*own_syntax\.py, line 1"),
        ("own_package.nets:small", {}, r"RuntimeError: imported \(.*own_package/__init__\.py, line 1"),
    ],
)
def test_wrong_functions_are_refused_with_one_line(folder: Path, function: str, settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_model(config_of(function, **settings), 5, 32, trust_code=True)
    assert str(folder) in str(caught.value) or function in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.usefixtures("folder")
def test_missing_module_is_refused_before_a_submission() -> None:
    check_source("own_nets:small")
    for name in ("own_nettz:small", "own_package.other:small"):
        with pytest.raises(UserError, match="there is no module"):
            check_source(name)
