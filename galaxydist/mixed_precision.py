"""Mixed precision of the training through Hugging Face's Accelerate, which no other module imports.

Accelerate casts the forward pass, scales the gradients of fp16 and wraps the optimizer. The processes and the device are chosen
here, and the model is wrapped here: Accelerate takes the local rank for the number of a rank's GPU.
"""

import contextlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, TorchDynamoPlugin

from galaxydist.devices import Precision, autocast
from galaxydist.errors import UserError


class MixedPrecision:
    """Casts the forward pass, and scales the loss with fp16.

    Args:
        precision: of the forward pass.
        device: the process's device.
        environ: names the settings in a message.
        timeout: of collectives, for a single process under a launcher, whose group Accelerate creates.

    Attributes:
        num_processes: processes that Accelerate knows.
        scaler: scaler of the loss and the gradients; None without fp16.

    Raises:
        UserError: settings in the environment that Accelerate does not accept.
    """

    def __init__(
        self, precision: Precision, device: torch.device, environ: Mapping[str, str], timeout: timedelta | None = None
    ) -> None:
        self.precision, self.device = precision, device
        self._accelerator = _build_accelerator(precision, device, environ, timeout)
        assert self._accelerator.device.type == device.type, f"Accelerate chose {self._accelerator.device}, not {device}"
        self.num_processes: int = self._accelerator.num_processes
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None  # Accelerate has none for a CPU
        self._accelerator.scaler = self.scaler

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return autocast(self.device, self.precision)

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return an optimizer whose ``step`` skips gradients that overflowed with fp16, and adapts the scale."""
        return self._accelerator.prepare(optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled with fp16."""
        self._accelerator.backward(loss)

    def unscale_gradients(self, optimizer: Any) -> None:
        """Divide the gradients by the scale; does nothing without fp16.

        Args:
            optimizer: from ``prepare``.
        """
        if self.scaler is not None:
            self.scaler.unscale_(optimizer.optimizer)

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """The scale of the next step, a float32 scalar on the device; None without fp16, and before the first backward pass."""
        return None if self.scaler is None else self.scaler._get_scale_async()

    def release(self) -> None:
        """Drop the optimizers from ``prepare``, which Accelerate keeps."""
        self._accelerator.free_memory()


def _build_accelerator(
    precision: Precision, device: torch.device, environ: Mapping[str, str], timeout: timedelta | None
) -> Accelerator:
    """Build the Accelerator with explicit values for all settings that it would otherwise read from the launcher's variables."""
    try:
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp64" else precision,
            # The environment variable would override the plain argument gradient_accumulation_steps.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(
                backend="no", mode="default", fullgraph=False, dynamic=False, use_regional_compilation=False
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except (ImportError, NotImplementedError, ValueError) as error:
        given = " ".join(f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith("ACCELERATE_"))
        raise UserError(f"Accelerate does not start: {error} (its settings in the environment: {given or 'none'})") from error
