"""Keep the log of transformers, and of torchao where it is installed, out of what the examples print."""

import logging

from transformers.utils import logging as transformers_logging

__all__ = ["quiet"]


def quiet() -> None:
    """Show errors only, and no progress bars. Call it before the first name is taken from transformers, which imports torchao."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):  # about kernels for GPUs, and a deprecation in torchao
        logging.getLogger(name).setLevel(logging.ERROR)
