"""Remarks of the libraries that a user can do nothing about. Torch is not imported."""

import logging
import warnings

WARNINGS = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*will save all extracted features in buffer.*",
    ".*LeafSpec.*",
    ".*exists and is not empty.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*your dataloader is not resumable.*",  # its sampler asks the trainer where to go on
    ".*`IterableDataset` has `__len__` defined.*",
    ".*`torch.jit.*is (deprecated|not supported).*",  # what the metrics' libraries use
    ".*Converting a tensor with requires_grad.*",
)
"""Warnings, as regular expressions."""

LINES = (
    "Tip:",
    "GPU available: False",
    "TPU available:",
    "`Trainer.fit` stopped: `max_steps=",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "Found current_model_state in the checkpoint",
    "was raised with message:",  # by a signal; `fit` says where the run stopped and how to resume it
)
"""What lines of the log contain."""

LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def quiet() -> None:
    """Leave them out from now on; before and after libraries are imported, which set filters of their own."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    """Whether a line of the log says something, to somebody."""
    text = record.getMessage()
    return bool(text.strip()) and not any(line in text for line in LINES)
