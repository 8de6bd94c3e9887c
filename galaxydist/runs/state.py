"""Nested state dicts as flat tensors plus plain JSON, and back, bit for bit: what a checkpoint can hold without pickle."""

import math
from collections.abc import Mapping
from typing import Any

import torch

_TAGS = ("@tensor", "@tuple", "@dict", "@float")


def flatten_state(prefix: str, state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Take a state dict (of an optimizer, a gradient scaler, an EMA) apart.

    Args:
        prefix: first part of the tensors' names, such as ``"optimizer"``.
        state: nested dicts (string or integer keys), lists and tuples of tensors, numbers, text, booleans and None.

    Returns:
        The tensors by name (``optimizer/state/0/exp_avg``; the same tensors, not copies) and a JSON-able description of the rest,
        for ``unflatten_state``.

    Raises:
        TypeError: something else stands in the state; the message names its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _flatten(prefix, state, tensors)


def _flatten(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: PLR0911
    if isinstance(value, torch.Tensor):
        while name in tensors:  # {"a/b": ...} beside {"a": {"b": ...}}
            name += "'"
        tensors[name] = value.detach()
        return {"@tensor": name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"@float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"@tuple": [_flatten(f"{name}/{i}", item, tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_flatten(f"{name}/{i}", item, tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(key, _flatten(f"{name}/{key}", item, tensors)) for key, item in value.items()]
        for key, _ in items:
            if type(key) not in (str, int):
                raise TypeError(f"{name} has a key {key!r} of type {type(key).__name__}; only str and int keys can be saved")
        if all(isinstance(key, str) and not key.startswith("@") for key, _ in items):
            return dict(items)
        return {"@dict": [[key, item] for key, item in items]}
    raise TypeError(
        f"{name} is a {type(value).__name__}; only tensors, numbers, text, None, lists, tuples and dicts can be saved"
    )


def unflatten_state(description: Any, tensors: Mapping[str, torch.Tensor]) -> Any:  # noqa: PLR0911
    """Put a state dict together again from what ``flatten_state`` gave (``tensors`` may hold others as well).

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(description, list):
        return [unflatten_state(item, tensors) for item in description]
    if not isinstance(description, dict):
        return description
    if len(description) == 1 and next(iter(description)) in _TAGS:
        tag, content = next(iter(description.items()))
        if tag == "@tensor":
            return tensors[content]
        if tag == "@float":
            return float(content)
        if tag == "@tuple":
            return tuple(unflatten_state(item, tensors) for item in content)
        return {key: unflatten_state(item, tensors) for key, item in content}
    return {key: unflatten_state(item, tensors) for key, item in description.items()}
