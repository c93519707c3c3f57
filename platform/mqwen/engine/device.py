"""From the host to the model's device."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STEPS = 3  # what the host shares with the card's work of a step serves again so many steps later: two are under way


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Without a wait. On the CPU the tensor is the array's own memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
