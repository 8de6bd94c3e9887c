"""The training state: everything that a checkpoint holds of a run."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from galaxydist.checkpoints.sharded import shard_like
from galaxydist.checkpoints.tensor_files import flatten_state, unflatten_state
from galaxydist.distributed import World
from galaxydist.errors import UserError
from galaxydist.training.batch_norm import GROUP, HasBuffers, gather_statistics, restore_statistics, split_statistics
from galaxydist.training.health.anomalies import LossSpikes, NonFiniteSteps, UnreadableImages
from galaxydist.training.optimizer import load_optimizer_state
from galaxydist.training.resume import EarlyStopping
from galaxydist.training.step_sync import LossSums
from galaxydist.version import __version__

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy")

# The optimizer's state under the parameters' names, which do not change with the number of processes or the strategy.


def named_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with the names of the parameters in place of their numbers.

    Args:
        model: the bare or sharded model, whose parameters are the optimizer's.
        optimizer: torch's optimizer, or the one that Accelerate prepared.
    """
    names = _names(model, optimizer)
    state = optimizer.state_dict()
    return {
        **state,
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]],
    }


def numbered_optimizer_state(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a state from ``named_optimizer_state`` into an argument of ``optimizer.load_state_dict``. Nothing is sent.

    Args:
        model, optimizer: the model and the optimizer to load into. The number of processes, the strategy and the parameter groups
            may differ from those of the saved state, the parameters may not.
        state: the saved state with names, or with numbers as in checkpoints up to 0.2; its tensors are sharded like the
            parameters, or whole.

    Raises:
        UserError: the state belongs to other parameters.
    """
    names = _names(model, optimizer)
    saved = [name for group in state["param_groups"] for name in group["params"]]
    has_numbers = all(isinstance(number, int) for number in saved)
    saved_names: dict[Any, str] = names if has_numbers else {name: name for name in saved}
    if set(saved_names.values()) != set(names.values()) or set(saved) != set(saved_names):
        different = sorted(set(saved_names.values()) ^ set(names.values())) or ["their number"]
        raise UserError(
            f"The checkpoint's optimizer moves other parameters than this run's ({different[0]}): model.freeze_backbone and the "
            "model must be as they were, or give another run.dir."
        )
    groups = {saved_names[key]: group for group in state["param_groups"] for key in group["params"]}
    values = {saved_names[key]: value for key, value in state["state"].items()}
    parameters = dict(model.named_parameters())
    numbers = iter(names)
    return {
        **state,
        "state": {number: _shard(values[name], parameters[name]) for number, name in names.items() if name in values},
        "param_groups": [
            {**groups[names_of[0]], "params": [next(numbers) for _ in names_of]} for names_of in _names_by_group(model, optimizer)
        ],
    }


def _shard(values: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Shard the values of a parameter's shape like the parameter."""

    def shard(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        value = shard_like(value, parameter)
        if isinstance(value, DTensor):
            return value
        # torch's fused kernels need the parameter's memory format (channels last) and device.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)

    return {key: shard(value) for key, value in values.items()}


def _names(model: nn.Module, optimizer: Any) -> dict[int, str]:
    """Return the parameters' names by number, in the order of the optimizer's groups."""
    return dict(enumerate(name for names in _names_by_group(model, optimizer) for name in names))


def _names_by_group(model: nn.Module, optimizer: Any) -> list[list[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, list[torch.Tensor]]] = optimizer.param_groups
    return [[known[id(parameter)] for parameter in group["params"]] for group in groups]


@dataclass
class TrainState:
    """Everything that changes during the training and that a restart needs.

    Args:
        model: the bare or sharded model.
        optimizer: the optimizer, prepared by Accelerate.
        scaler: gradient scaler of fp16, or None.
        ema: moving average of the weights, or None.
        stopping: early stopping, with the best validation so far.
        skipped: galaxies that could not be read.
        nonfinite: skipped steps.
        spikes: the last losses.
        window: sums since the last line of metrics.jsonl.
        micro_batch: result of ``train.micro_batch=auto``, and the conditions that it depends on.
        threads: threads of each process, and the number of processes.
        step: optimizer steps done.
        tracker_run_id: id of the tracked run.
    """

    model: nn.Module
    optimizer: Any
    scaler: Any
    ema: HasBuffers | None
    stopping: EarlyStopping
    skipped: UnreadableImages
    nonfinite: NonFiniteSteps
    spikes: LossSpikes
    window: LossSums = field(default_factory=LossSums)
    micro_batch: dict[str, Any] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    step: int = 0
    tracker_run_id: str | None = None

    def to_checkpoint(self, world: World) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors by name, and everything else as plain JSON values. All ranks take part.

        The batch-norm statistics of the models are the means over the ranks; the ranks' own are saved beside them.
        """
        rows = gather_statistics(world, self.modules())
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, state in self._state_dicts().items():
            if (rows_Wn := rows.get(f"{GROUP}/{name}")) is not None:
                means = split_statistics(rows_Wn.mean(dim=0), self.modules()[name])
                state |= {key: mean.to(state[key].dtype) for key, mean in means.items()}
            found, described[name] = flatten_state(name, state)
            tensors |= found
        progress = {
            "step": self.step,
            "tracker_run_id": self.tracker_run_id,
            "micro_batch": self.micro_batch,
            "threads": self.threads,
            **{name: part.state_dict() for name, part in self._progress().items()},
        }
        return tensors | rows, {"progress": progress, "described": described, "versions": library_versions()}

    def from_checkpoint(self, world: World, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore the state of ``to_checkpoint``.

        Each rank gets its own batch-norm statistics if there are as many ranks as then, else the means.

        Raises:
            UserError: the checkpoint belongs to another model or optimizer.
        """
        loaded = {name: unflatten_state(described, tensors) for name, described in state["described"].items()}
        expected = set(self._state_dicts())
        if set(loaded) != expected:
            raise UserError(
                f"The checkpoint holds {sorted(loaded)}, this run needs {sorted(expected)}. "
                "Continue with the recipe and precision it was made with, or give another run.dir."
            )
        try:
            for name, module in self.modules().items():
                module.load_state_dict(loaded[name])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"The checkpoint's weights are not this model's ({str(error).strip().splitlines()[-1].strip()}). "
                "Continue with the model that it was made with, or give another run.dir."
            ) from error
        restore_statistics(world, self.modules(), tensors)
        numbered = numbered_optimizer_state(self.model, self.optimizer, loaded["optimizer"])
        load_optimizer_state(self.optimizer, numbered)
        if self.scaler is not None:
            self.scaler.load_state_dict(loaded["scaler"])
        progress = state["progress"]
        self.step = progress["step"]
        self.tracker_run_id = progress["tracker_run_id"]
        for name, part in self._progress().items():
            if name in progress:  # older checkpoints have fewer
                part.load_state_dict(progress[name])

    def modules(self) -> dict[str, HasBuffers]:
        """Return the model, and its moving average if there is one, by their names in a checkpoint."""
        return {"model": self.model} if self.ema is None else {"model": self.model, "ema": self.ema}

    def _state_dicts(self) -> dict[str, dict[str, Any]]:
        states = {name: dict(module.state_dict()) for name, module in self.modules().items()}
        states["optimizer"] = named_optimizer_state(self.model, self.optimizer)
        if self.scaler is not None:
            states["scaler"] = self.scaler.state_dict()
        return states

    def _progress(self) -> dict[str, Stateful]:
        return {
            "stopping": self.stopping,
            "skipped": self.skipped,
            "nonfinite": self.nonfinite,
            "spikes": self.spikes,
            "window": self.window,
        }


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of galaxydist and of the libraries on which the numbers of a run depend."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **libraries, "galaxydist": __version__}
