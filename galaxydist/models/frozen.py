"""Training the head alone: what is frozen has no gradient and stays in evaluation mode, so that no statistic of it moves."""

from collections.abc import Iterator, Sequence

from torch import nn


class FrozenBackbone(nn.Module):
    """Put in front of a model's class by ``freeze_backbone``: ``train()`` leaves everything but the head in evaluation mode.

    Setting the mode once is not enough: every epoch calls ``model.train()``, and a batch-norm layer in training mode moves its
    statistics even where its parameters have no gradient.
    """

    head_names: tuple[str, ...]

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        for module in _outside(self, self.head_names):
            module.training = False
        return self


def freeze_backbone(model: nn.Module, head_names: Sequence[str]) -> None:
    """Freeze all of ``model``, in place, except the modules named in ``head_names`` (and what is in them).

    The model keeps its parameter names, and a copy of it (the moving average) stays frozen, because the class itself changes
    and not the object's methods.
    """
    inside = {id(parameter) for name in head_names for parameter in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in inside)
    frozen = type(f"Frozen{type(model).__name__}", (FrozenBackbone, type(model)), {"head_names": tuple(head_names)})
    model.__class__ = frozen
    model.train(model.training)


def _outside(model: nn.Module, head_names: Sequence[str]) -> Iterator[nn.Module]:
    """The modules that neither hold a head module, nor are one, nor lie in one."""
    for name, module in model.named_modules():
        around = any(head == name or head.startswith(f"{name}.") or name.startswith(f"{head}.") for head in head_names)
        if name and not around:
            yield module
