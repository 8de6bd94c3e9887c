"""Published weights: fetched from a hub on loopback, found on this machine, loaded, and refused where they are no weights."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from galaxydist.errors import UserError
from galaxydist.models.build import build_model, describe_model, input_statistics
from galaxydist.models.hub_weights import (
    check_files,
    fetch_command,
    fetch_weights,
    find_weights,
    read_record,
    shipped_path,
    weights_file,
)
from galaxydist.models.registry import ARCHITECTURES
from galaxydist.models.weights import write_weights
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import ModelConfig
from tests.helpers.mini_hub import COMMIT, Repository, mini_hub
from tests.helpers.runs import captured_log

RESNET = ModelConfig(name="resnet18", pretrained=True)
RESNET_REPO = "timm/resnet18.a1_in1k"
ENCODER = ModelConfig(name="hf-hub:me/encoder", pretrained=True)
CONFIG = {
    "architecture": "test_convnext",
    "num_classes": 0,
    "model_args": {"drop_path_rate": 0.0},
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "classifier": "head.fc",
        "first_conv": "stem.0",
        "license": "mit",
    },
}


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def encoder_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state: dict[str, torch.Tensor] = timm.create_model("test_convnext", num_classes=0).state_dict()
    return state


def encoder(**files: bytes) -> Repository:
    return Repository({"config.json": json.dumps(CONFIG).encode(), **files}, {"license": "cc-by-nc-sa-4.0"})


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("config", "timm_model"),
    [
        (ModelConfig(name="resnet18", pretrained=True), "resnet18"),
        (ModelConfig(name="vit", pretrained=True), "vit_small_patch16_224"),
        pytest.param(ModelConfig(name="resnet26", pretrained=True), "resnet26", marks=pytest.mark.slow),
        pytest.param(ModelConfig(name="resnet50", pretrained=True), "resnet50", marks=pytest.mark.nightly),
        pytest.param(ModelConfig(name="vit", size="base", pretrained=True), "vit_base_patch16_224", marks=pytest.mark.nightly),
        pytest.param(ModelConfig(name="vgg16", pretrained=True), "vgg16_bn", marks=pytest.mark.slow),
        pytest.param(ModelConfig(name="vgg19", pretrained=True), "vgg19_bn", marks=pytest.mark.nightly),
        pytest.param(ModelConfig(name="reference_vgg16", pretrained=True), "vgg16", marks=pytest.mark.slow),
        pytest.param(ModelConfig(name="reference_vgg19", pretrained=True), "vgg19", marks=pytest.mark.nightly),
    ],
)
def test_cached_timm_weights_load_into_every_pretrained_model(tmp_path: Path, config: ModelConfig, timm_model: str) -> None:
    """Published files are timm's state_dict with 1,000 classes: here one with random weights stands where a fetched one would."""
    published = timm.create_model(timm_model).state_dict()
    save_file(published, weights_file(config, tmp_path))
    with captured_log() as said:
        model = build_model(config, 10, 64, weights_dir=tmp_path)
    assert any("head" in text for text in said)
    own = model.state_dict()
    same = [name for name in own if name in published and torch.equal(own[name], published[name])]
    left_out = {name for name in own if name not in same and not name.startswith(ARCHITECTURES[config.name].head)}
    assert left_out <= {"pos_embed"}  # resampled to 64 pixels


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["convnext_nano", "dinov2_small", "dinov3_small", "maxvit_tiny", "efficientnet_lite0"])
def test_files_as_timm_publishes_them_load_into_the_encoders_of_recipes(tmp_path: Path, recipe: str) -> None:
    """The file has timm's own size and number of classes: 518 pixels and no head for DINOv2."""
    found = load_recipe([f"recipe={recipe}"]).recipe
    published = timm.create_model(found.model.name.removeprefix("timm/")).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in published.items()}, weights_file(found.model, tmp_path))
    own = build_model(found.model, 10, found.data.image_size, weights_dir=tmp_path).state_dict()
    changed = {name for name in own if name not in published or not torch.equal(own[name], published[name])}
    assert all(own[name].shape[0] == 10 or "pos_embed" in name for name in changed), changed


def test_missing_pretrained_weights_name_the_fetch_command_and_pretrained_false(tmp_path: Path) -> None:
    for config, command in (
        (ModelConfig(name="vit", pretrained=True), "galaxydist weights fetch recipe=vit\n"),
        (ModelConfig(name="vit", size="base", pretrained=True), "recipe=vit model.size=base\n"),
        (ModelConfig(name="timm/test_vit.r160_in1k", pretrained=True), "galaxydist weights fetch timm/test_vit.r160_in1k\n"),
        (ENCODER, "galaxydist weights fetch hf-hub:me/encoder"),
    ):
        for find in (find_weights, check_files):
            with pytest.raises(UserError) as caught:
                find(config, tmp_path)
            assert command in str(caught.value)


def test_fetch_command_names_a_recipe_with_the_same_weights_file() -> None:
    for name, architecture in ARCHITECTURES.items():
        if architecture.has_published_weights:
            config = ModelConfig(name=name)
            found = load_recipe(fetch_command(config).split()[3:]).recipe.model
            assert weights_file(found, Path()) == weights_file(config, Path())


def test_fetch_weights_downloads_once_and_build_model_uses_the_file(tmp_path: Path) -> None:
    published = timm.create_model("resnet18").state_dict()
    body = save(published)
    repository = Repository({"model.safetensors": body}, {"license": "other", "license_name": "own", "license_link": "LICENSE"})
    with mini_hub({RESNET_REPO: repository}) as endpoint:
        path = fetch_weights(RESNET, tmp_path / "weights", endpoint=endpoint)
    assert path == weights_file(RESNET, tmp_path / "weights")
    assert path.read_bytes() == body
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, f"{path.stem}.json"}, "nothing else is left behind"
    model = build_model(RESNET, 10, 32, weights_dir=tmp_path / "weights")
    assert torch.equal(model.state_dict()["conv1.weight"], published["conv1.weight"])
    record = read_record(RESNET, tmp_path / "weights")
    assert (record.source, record.licence) == (f"{RESNET_REPO}@{COMMIT}", "own (LICENSE)")
    assert fetch_weights(RESNET, tmp_path / "weights", endpoint="http://127.0.0.1:1") == path, "no second download"


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": lambda: save(encoder_state())},
        {"pytorch_model.bin": lambda: pickled(encoder_state())},
        {"pytorch_model.bin": lambda: pickled({"state_dict": encoder_state()})},
    ],
    ids=["safetensors", "pickle", "nested pickle"],
)
def test_repository_in_timms_format_is_fetched_built_and_recorded(tmp_path: Path, files: dict[str, Callable[[], bytes]]) -> None:
    with mini_hub({"me/encoder": encoder(**{name: content() for name, content in files.items()})}) as endpoint:
        path = fetch_weights(ENCODER, tmp_path, endpoint=endpoint)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["config.json", "model.safetensors", "source.json"]
    assert path.parent.parent == tmp_path and len(list(tmp_path.iterdir())) == 1
    assert load_file(path).keys() == encoder_state().keys()
    check_files(ENCODER, tmp_path)
    model = build_model(ENCODER, 5, 64, weights_dir=tmp_path)
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in encoder_state().items())
    assert own["head.fc.weight"].shape[0] == 5
    assert input_statistics(ENCODER, model) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    record = describe_model(ENCODER, tmp_path)
    assert (record.source, record.licence) == (f"me/encoder@{COMMIT}", "cc-by-nc-sa-4.0")
    # A checkpoint is loaded without the repository's files.
    bare = ENCODER.model_copy(update={"pretrained": False})
    again = build_model(bare, 5, 64, record=type(record).from_dict(json.loads(json.dumps(record.to_dict()))))
    again.load_state_dict(own)
    # The same folder by its path.
    local = ModelConfig(name=f"local-dir:{path.parent}", pretrained=True)
    assert torch.equal(build_model(local, 5, 64).state_dict()["stem.0.weight"], own["stem.0.weight"])


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_pickle_with_code_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for content in (pickled({"stem.0.weight": _Hostile(trap)}), pickle.dumps(_Hostile(trap)), pickled([1, 2]), b"no pickle"):
        with (
            mini_hub({"me/encoder": encoder(**{"pytorch_model.bin": content})}) as endpoint,
            pytest.raises(UserError, match=r"pytorch_model\.bin: (refused|it does not hold named tensors)"),
        ):
            fetch_weights(ENCODER, tmp_path / "weights", endpoint=endpoint)
        assert not trap.exists() and list((tmp_path / "weights").iterdir()) == []
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "pytorch_model.bin").write_bytes(pickled({"stem.0.weight": _Hostile(trap)}))
    with pytest.raises(UserError, match="refused"):
        build_model(ModelConfig(name=f"local-dir:{folder}", pretrained=True), 5, 64)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("repository", "words"),
    [
        (None, r"no such repository at http.*me/encoder, or it is private.*hf auth login"),
        (
            Repository({"model.safetensors": b""}, is_gated=True),
            r"licence has to be accepted first.*me/encoder, then run `hf auth",
        ),
        (Repository({"README.md": b"x"}), r"me/encoder has no model\.safetensors.*README\.md"),
        (Repository({"model.safetensors": save({"a": torch.zeros(2)})}), r"me/encoder has no config\.json"),
        (
            Repository({"model.safetensors": save({"a": torch.zeros(2)}), "config.json": b'{"model_type": "vit"}'}),
            r"not in timm's format.*package\.module:function",
        ),
        (
            Repository({"model.safetensors": save({"a": torch.zeros(3)})}, hashes={"model.safetensors": "0" * 64}),
            "damaged on the way",
        ),
    ],
    ids=["missing", "gated", "empty", "no config", "transformers", "damaged"],
)
def test_repository_that_cannot_be_used_is_refused_and_leaves_no_file(
    tmp_path: Path, repository: Repository | None, words: str
) -> None:
    with mini_hub({} if repository is None else {"me/encoder": repository}) as endpoint, pytest.raises(UserError, match=words):
        fetch_weights(ENCODER, tmp_path, endpoint=endpoint)
    assert list(tmp_path.iterdir()) == []


def test_unknown_revision_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(name="hf-hub:me/encoder@v9")
    with mini_hub({"me/encoder": encoder()}) as endpoint, pytest.raises(UserError, match="no such revision"):
        fetch_weights(config, tmp_path, endpoint=endpoint)


def test_fetch_weights_without_network_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"galaxydist weights fetch recipe=resnet18.*model\.pretrained=false"):
        fetch_weights(RESNET, tmp_path, endpoint="http://127.0.0.1:1", timeout=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reference_cnn", "reference_cnn has no published weights"),
        ("timm/convnext_nano", r"add their tag; weights of convnext_nano: timm/convnext_nano\.in12k_ft_in1k"),
        ("timm/convnext_nono", "did you mean timm/convnext_nano"),
        ("timm/convnext_nano.in12", r"did you mean timm/convnext_nano\.in12k"),
        ("my.models:net", "function of your own"),
    ],
)
def test_names_without_published_weights_are_refused_with_the_nearest(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fetch_weights(ModelConfig(name=name), tmp_path, endpoint="http://127.0.0.1:1", timeout=2)


def test_weights_in_the_package_are_used_with_their_normalisation_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("galaxydist.models.hub_weights.SHIPPED_DIR", tmp_path)
    config = ModelConfig(name="d4_cnn", width=16, pretrained=True)
    with pytest.raises(UserError, match=r"brings no weights of d4_cnn along.*model\.pretrained=false"):
        build_model(config, 10, 32)
    state = build_model(config.model_copy(update={"pretrained": False}), 10, 32).state_dict()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    statistics = ((0.1, 0.2, 0.3), (0.01, 0.02, 0.03))
    write_weights(shipped_path("d4_cnn"), half, statistics, config)
    own = build_model(config, 10, 32).state_dict()
    assert all(torch.equal(own[name], tensor.float()) for name, tensor in half.items() if tensor.is_floating_point())
    assert input_statistics(config) == statistics
    assert input_statistics(config.model_copy(update={"normalization": "data"})) is None
    assert read_record(config, None).licence == "MIT"
    assert fetch_weights(config, tmp_path / "none") == shipped_path("d4_cnn")
    with pytest.raises(UserError, match=r"of d4_cnn with model\.width=16"):
        build_model(config.model_copy(update={"width": 32}), 10, 32)
