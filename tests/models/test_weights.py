"""Weights from files: what fits is loaded, what does not is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from galaxydist.errors import UserError
from galaxydist.models.build import build_model, input_statistics
from galaxydist.models.weights import write_weights
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
