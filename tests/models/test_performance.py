"""TensorFloat-32, channels last and torch.compile: switched as asked, the same numbers, the same names."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from filelock import FileLock
from torch import nn

from galaxydist.errors import EveryRankError
from galaxydist.models.build import build_model, evaluation_mode
from galaxydist.models.performance import (
    checkpoint_activations,
    choose_memory_format,
    compile_model,
    cudnn_benchmark,
    deterministic_algorithms,
    remove_broken_libraries,
    set_memory_format,
    set_tf32,
)
from galaxydist.recipe.schema import ModelConfig

CPU = torch.device("cpu")
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++"))

SWITCHES = """
import torch
from galaxydist.models.performance import set_tf32
backends = torch.backends
def read():
    new = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    old = [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
    return [torch.get_float32_matmul_precision(), *(part.fp32_precision for part in new), *old]
untouched = read()
set_tf32(True, torch.device("cpu"))
assert read() == untouched
for enabled in (True, False, True):
    set_tf32(enabled, torch.device("cuda"))
    name = "tf32" if enabled else "ieee"
    assert read() == ["high" if enabled else "highest", name, name, name, enabled, enabled], read()
"""


def test_set_tf32_switches_all_torch_settings_consistently() -> None:
    """In a process of its own: the switches are global, and mixing their names wrongly is an error when they are read."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", SWITCHES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_reduces_the_precision_of_matmul_on_a_gpu() -> None:
    a = torch.randn(512, 512, device="cuda")
    exact = (a.double() @ a.double()).float()
    errors = []
    for enabled in (True, False):
        set_tf32(enabled, a.device)
        errors.append((a @ a - exact).abs().max().item())
    assert errors[0] > 10 * errors[1]


@pytest.mark.parametrize("name", ["custom_cnn", "resnet18", "d4_cnn"])
def test_channels_last_changes_only_the_memory_layout(name: str) -> None:
    torch.manual_seed(0)
    plain = build_model(ModelConfig.model_validate({"name": name}), 5, 32)
    fast = copy.deepcopy(plain)
    parameters = [*fast.parameters()]
    set_memory_format(fast, torch.channels_last)
    assert all(before is after for before, after in zip(parameters, fast.parameters(), strict=True))
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True))
    convolutions = [weight for weight in parameters if weight.ndim == 4]
    assert (convolutions or name == "d4_cnn") and all(
        weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions
    )
    images_BCHW = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        fast(images_BCHW.contiguous(memory_format=torch.channels_last)), plain(images_BCHW), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "device", "dtype", "is_last"),
    [
        ("resnet18", "cuda", torch.float32, True),
        ("custom_cnn", "cuda", torch.float32, True),
        ("resnet18", "cuda", torch.float64, False),
        ("resnet18", "cpu", torch.float32, False),
        ("vit", "cuda", torch.float32, False),
    ],
)
def test_auto_is_channels_last_for_convolutional_models_on_a_gpu(
    name: str, device: str, dtype: torch.dtype, is_last: bool
) -> None:
    model = build_model(ModelConfig.model_validate({"name": name}), 5, 32)
    found = {
        setting: choose_memory_format(setting, model, torch.device(device), dtype) == torch.channels_last
        for setting in (True, False, "auto")
    }
    assert found == {True: True, False: False, "auto": is_last}


def test_cudnn_tries_no_kernels_in_an_evaluation_within_a_training() -> None:
    """Otherwise the timing on each process would decide on the last bits of the logits."""
    backend: Any = torch.backends.cudnn
    before = backend.benchmark
    with cudnn_benchmark(True):
        assert backend.benchmark
        with evaluation_mode(nn.Linear(1, 1)):
            assert not backend.benchmark
        assert backend.benchmark
    assert backend.benchmark == before


def tiny_vit() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=1, num_classes=4)
    return model


def take_steps(model: nn.Module, sizes: tuple[int, ...]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(model(torch.randn(size, 3, 32, 32)), torch.arange(size) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.timeout(900)
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile on a CPU needs a C++ compiler, and there is none")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("batch norm", marks=pytest.mark.slow),
        pytest.param("checkpointed", marks=pytest.mark.nightly),
        pytest.param("deterministic", marks=pytest.mark.nightly),
    ],
)
def test_compiled_model_has_the_losses_and_weights_of_the_plain_one(kind: str) -> None:
    """Two sizes of batch: the last micro-batch may hold one image less (once: compiling takes a minute)."""
    sizes = (5, 5) if kind == "checkpointed" else (5, 4)
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
    small = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    plain = tiny_vit() if kind == "checkpointed" else small
    compiled = copy.deepcopy(plain)
    if kind == "checkpointed":
        checkpoint_activations(compiled)
    compile_model(compiled, CPU)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    with deterministic_algorithms(kind == "deterministic", {}):
        losses = take_steps(compiled, sizes)
    assert losses == pytest.approx(take_steps(plain, sizes), abs=1e-4)
    for a, b in zip(compiled.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(compiled)
    assert list(twin.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(
        twin.eval()(torch.ones(2, 3, 32, 32)), plain.eval()(torch.ones(2, 3, 32, 32)), rtol=1e-4, atol=1e-5
    )


def test_compile_without_a_cpp_compiler_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setenv("PATH", "")
    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with pytest.raises(EveryRankError, match=r"train\.compile=true needs a C\+\+ compiler"):
            compile_model(nn.Linear(2, 2), CPU)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


def test_compiling_checkpointed_batch_norm_is_refused() -> None:
    model = build_model(ModelConfig(name="custom_cnn", width=4), 4, 32)
    checkpoint_activations(model)
    with pytest.raises(EveryRankError, match="do not go together in CustomCNN"):
        compile_model(model, CPU)


def test_broken_libraries_of_a_killed_compilation_are_removed(tmp_path: Path) -> None:
    whole = Path(torch._C.__file__).read_bytes()
    folder = tmp_path / "ab"
    folder.mkdir()
    contents = {
        "whole": whole,
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "zeros": bytes(len(whole)),
        "compiled-now": b"",
        "foreign": b"MZ" * 40,
    }
    for name, content in contents.items():
        (folder / f"{name}.main.so").write_bytes(content)
    (folder / "empty.main.cpp").write_text("int main;")
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "compiled-now.lock"):
        assert [path.name for path in remove_broken_libraries(tmp_path)] == ["cut.main.so", "empty.main.so", "zeros.main.so"]
    assert {path.name for path in folder.iterdir()} == {
        "compiled-now.main.so",
        "empty.main.cpp",
        "foreign.main.so",
        "whole.main.so",
    }
    assert remove_broken_libraries(tmp_path / "none") == []


def test_deterministic_algorithms_are_restored_and_set_the_workspace_of_cublas() -> None:
    def settings() -> tuple[int, bool, bool]:
        memory: Any = torch.utils.deterministic
        return torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic, memory.fill_uninitialized_memory

    before = settings()
    environ: dict[str, str] = {}
    with deterministic_algorithms(False, environ):
        assert (settings(), environ) == (before, {})
    with pytest.raises(ZeroDivisionError), deterministic_algorithms(True, environ):
        assert (settings(), environ) == ((2, True, False), {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
        raise ZeroDivisionError
    assert settings() == before
    with (
        pytest.raises(EveryRankError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, not :0:0"),
        deterministic_algorithms(True, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}),
    ):
        pass


CUBLAS = (
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or ..., but this operation is not "
    "deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set "
    "an environment variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8"
)


@pytest.mark.parametrize("text", [CUBLAS, "another error"])
def test_workspace_that_was_chosen_before_is_told_with_a_remedy(text: str) -> None:
    kind, match = (EveryRankError, "restart its kernel") if text == CUBLAS else (RuntimeError, text)
    with pytest.raises(kind, match=match), deterministic_algorithms(True, {}):
        raise RuntimeError(text)


TWO_RUNS = """
import os, torch
from galaxydist.errors import EveryRankError
from galaxydist.models.performance import deterministic_algorithms
a = torch.ones(64, 64, device="cuda")
a @ a
try:
    with deterministic_algorithms(True, os.environ):
        a @ a
except EveryRankError as error:
    print(error)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_deterministic_run_after_another_one_in_a_process_is_refused_or_exact() -> None:
    """torch may also read the variable each time."""
    environ = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run([sys.executable, "-c", TWO_RUNS], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" or "restart its kernel" in done.stdout
