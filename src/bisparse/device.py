"""A device by its name, tried before anything is done on it."""

from __future__ import annotations

import torch

from bisparse.errors import printable

__all__ = ["usable_device"]


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name, if it is here and holds numbers.

    Raises:
        ValueError: there is no such kind, or number, of device; or it is the meta device.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"{str(name)!r} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise ValueError(f"{str(name)!r} holds no numbers: nothing can be computed there")
    return device
