"""An optimizer's state under the parameters' names: what goes on when the number of processes or the strategy changes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from galaxydist.errors import UserError
from galaxydist.training.sharding import cut_like


def named_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """``optimizer.state_dict()`` with the names of the parameters in place of their numbers.

    Args:
        model: bare, sharded or not; its parameters are the optimizer's.
        optimizer: torch's, or as Accelerate prepared it.
    """
    names = _names(model, optimizer)
    state = optimizer.state_dict()
    return {
        **state,
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]],
    }


def numbered_optimizer_state(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, from ``named_optimizer_state``. Nothing is sent.

    Args:
        model, optimizer: to be loaded into; other processes, another strategy or other parameter groups than when it was saved
            will do, other parameters will not.
        state: with names, or with numbers as in checkpoints up to 0.2; its tensors sharded like the parameters, or whole.

    Raises:
        UserError: it is the state of other parameters.
    """
    names = _names(model, optimizer)
    saved = [name for group in state["param_groups"] for name in group["params"]]
    if all(isinstance(number, int) for number in saved):
        saved_names: dict[Any, str] = dict(names)
    else:
        saved_names = {name: name for name in saved}
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
        "state": {number: _cut(values[name], parameters[name]) for number, name in names.items() if name in values},
        "param_groups": [
            {**groups[names_of[0]], "params": [next(numbers) for _ in names_of]} for names_of in _names_by_group(model, optimizer)
        ],
    }


def _cut(values: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    return {
        key: _laid_out(cut_like(value, parameter), parameter)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in values.items()
    }


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """In memory as the parameter is (channels last, on its device): torch's fused kernels take no other."""
    if isinstance(value, DTensor):
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _names(model: nn.Module, optimizer: Any) -> dict[int, str]:
    """Name by number, in the order of the optimizer's groups."""
    return dict(enumerate(name for names in _names_by_group(model, optimizer) for name in names))


def _names_by_group(model: nn.Module, optimizer: Any) -> list[list[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, list[torch.Tensor]]] = optimizer.param_groups
    return [[known[id(parameter)] for parameter in group["params"]] for group in groups]
