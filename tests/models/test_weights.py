"""Weights from files and from a hub: what fits is loaded, what does not is named, and nothing waits for a network."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from galaxydist.errors import UserError
from galaxydist.models.build import build_model, input_statistics
from galaxydist.models.registry import ARCHITECTURES
from galaxydist.models.hub_weights import fetch_command, fetch_weights, weights_file
from galaxydist.models.weights import write_weights
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import ModelConfig
from tests.helpers.runs import captured_log

CNN = ModelConfig(name="custom_cnn", width=8)


def build(config: ModelConfig, num_classes: int = 10, image_size: int = 32, **options: Path) -> tuple[nn.Module, list[str]]:
    with captured_log() as said:
        return build_model(config, num_classes, image_size, **options), said


def with_weights(config: ModelConfig, path: Path) -> ModelConfig:
    return config.model_copy(update={"weights": path})


def random_state(config: ModelConfig, num_classes: int = 10, image_size: int = 32) -> dict[str, Tensor]:
    torch.manual_seed(42)
    return build(config, num_classes, image_size)[0].state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_with_ddp_or_compile_prefixes_are_loaded(tmp_path: Path, prefix: str) -> None:
    state = random_state(CNN)
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "w.safetensors")
    model, said = build(with_weights(CNN, tmp_path / "w.safetensors"))
    assert said == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_written_weights_are_read_back_with_their_input_statistics(tmp_path: Path) -> None:
    state = random_state(CNN)
    statistics = ((0.1, 0.2, 0.3), (0.01, 0.02, 0.03))
    path = tmp_path / "w.safetensors"
    write_weights(
        path, {f"_orig_mod.{n}": t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in state.items()}
    )
    assert input_statistics(with_weights(CNN, path)) is None
    write_weights(path, state, statistics)
    assert input_statistics(with_weights(CNN, path)) == statistics
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    model, said = build(with_weights(CNN, path))
    assert said == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_bf16_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in random_state(CNN).items()}
    save_file(state, tmp_path / "w.safetensors")
    model, _ = build(with_weights(CNN, tmp_path / "w.safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, state[name].float()) for name, p in model.named_parameters())


def test_head_for_another_number_of_classes_is_left_out_with_a_message(tmp_path: Path) -> None:
    state = random_state(CNN, num_classes=7)
    save_file(state, tmp_path / "w.safetensors")
    model, said = build(with_weights(CNN, tmp_path / "w.safetensors"), num_classes=10)
    assert len(said) == 1
    assert "head" in said[0]
    own = model.state_dict()
    assert own["head.weight"].shape[0] == 10
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items() if not name.startswith("head."))


def test_weights_without_a_head_are_loaded_with_a_message(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in random_state(CNN).items() if not name.startswith("head.")}
    save_file(state, tmp_path / "w.safetensors")
    _, said = build(with_weights(CNN, tmp_path / "w.safetensors"))
    assert len(said) == 1


def test_position_embedding_is_resampled_to_the_recipes_image_size(tmp_path: Path) -> None:
    vit = ModelConfig(name="vit")
    state = random_state(vit, image_size=64)
    save_file(state, tmp_path / "w.safetensors")
    model, said = build(with_weights(vit, tmp_path / "w.safetensors"), image_size=96)
    assert [text.rsplit(": ")[-1] for text in said] == ["position embedding resampled from 4 x 4 to 6 x 6 patches"]
    positions = model.state_dict()["pos_embed"]
    assert positions.shape[1] == 1 + 36
    assert torch.equal(positions[:, 0], state["pos_embed"][:, 0]), "the class token's own embedding is no patch"


def test_weights_path_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        build(with_weights(CNN, tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="is a folder"):
        build(with_weights(CNN, tmp_path))


def test_pickles_and_truncated_weight_files_are_refused(tmp_path: Path) -> None:
    torch.save(random_state(CNN), tmp_path / "w.pt")
    whole = save(random_state(CNN))
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").touch()
    for name in ("w.pt", "torn.safetensors", "empty.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: not a whole safetensors file"):
            build(with_weights(CNN, tmp_path / name))


def test_weights_that_do_not_fit_are_refused_naming_every_problem(tmp_path: Path) -> None:
    state = random_state(CNN)
    first, second, third = list(state)[:3]
    wrong = {name: tensor for name, tensor in state.items() if name != first}
    wrong[second] = torch.zeros(3, 5)
    wrong[third] = torch.full_like(state[third], float("nan"))
    wrong["stranger.weight"] = torch.zeros(2)
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as caught:
        build(with_weights(CNN, tmp_path / "w.safetensors"))
    text = str(caught.value)
    assert f"missing in the file: {first}" in text
    assert f"{second} (file (3, 5), model {tuple(state[second].shape)})" in text
    assert "not in this model: stranger.weight" in text
    assert f"with nan or inf: {third}" in text


def test_another_architectures_weights_give_a_short_message(tmp_path: Path) -> None:
    save_file(random_state(ModelConfig(name="resnet18")), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"model\.name") as caught:
        build(with_weights(CNN, tmp_path / "w.safetensors"))
    assert "more" in str(caught.value)
    assert len(str(caught.value)) < 1500


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
    model, said = build(config, 10, 64, weights_dir=tmp_path)
    assert any("head" in text for text in said)
    own = model.state_dict()
    same = [name for name in own if name in published and torch.equal(own[name], published[name])]
    left_out = {name for name in own if name not in same and not name.startswith(ARCHITECTURES[config.name].head)}
    assert left_out <= {"pos_embed"}  # resampled to 64 pixels


def test_missing_pretrained_weights_name_the_fetch_command_and_pretrained_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for size, command in (("small", "galaxydist weights fetch recipe=vit\n"), ("base", "recipe=vit model.size=base\n")):
        with pytest.raises(UserError) as caught:
            build(ModelConfig(name="vit", size=size, pretrained=True), weights_dir=tmp_path)
        assert command in str(caught.value)
        assert "model.pretrained=false" in str(caught.value)


def test_fetch_command_names_a_recipe_with_the_same_weights_file() -> None:
    for name, architecture in ARCHITECTURES.items():
        if architecture.has_published_weights:
            config = ModelConfig(name=name)  # type: ignore[arg-type]
            found = load_recipe(fetch_command(config).split()[3:]).recipe.model
            assert weights_file(found, Path()) == weights_file(config, Path())


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as one file needs: its head with size, commit and SHA-256, and its bytes."""

    body: bytes
    stated_hash: str

    def do_HEAD(self) -> None:
        if not self.path.endswith("/timm/resnet18.a1_in1k/resolve/main/model.safetensors") and "resolve" not in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{self.stated_hash}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    handler = type("OneFileHub", (Hub,), {"body": b"", "stated_hash": ""})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


RESNET = ModelConfig(name="resnet18", pretrained=True)


def test_fetch_weights_downloads_once_and_build_model_uses_the_file(tmp_path: Path, hub: tuple[type[Hub], str]) -> None:
    handler, endpoint = hub
    published = timm.create_model("resnet18").state_dict()
    handler.body = save(published)
    handler.stated_hash = hashlib.sha256(handler.body).hexdigest()
    path = fetch_weights(RESNET, tmp_path / "weights", endpoint=endpoint)
    assert path == weights_file(RESNET, tmp_path / "weights")
    assert path.read_bytes() == handler.body
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing else is left behind"
    model, _ = build(RESNET, weights_dir=tmp_path / "weights")
    assert torch.equal(model.state_dict()["conv1.weight"], published["conv1.weight"])
    assert fetch_weights(RESNET, tmp_path / "weights", endpoint="http://127.0.0.1:1") == path, "no second download"


def test_damaged_weights_download_is_refused_and_removed(tmp_path: Path, hub: tuple[type[Hub], str]) -> None:
    handler, endpoint = hub
    handler.body = save({"conv1.weight": torch.zeros(3)})
    handler.stated_hash = "0" * 64
    with pytest.raises(UserError, match="damaged on the way"):
        fetch_weights(RESNET, tmp_path, endpoint=endpoint)
    assert list(tmp_path.iterdir()) == []


def test_fetch_weights_without_network_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"galaxydist weights fetch recipe=resnet18.*model\.pretrained=false"):
        fetch_weights(RESNET, tmp_path, endpoint="http://127.0.0.1:1", timeout=2)
    assert list(tmp_path.iterdir()) == []


def test_fetch_weights_of_custom_cnn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="custom_cnn has no published weights"):
        fetch_weights(ModelConfig(name="custom_cnn"), tmp_path)
