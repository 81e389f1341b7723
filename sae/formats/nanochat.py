"""The nanochat document's best_model.pt: {"sae_state_dict", "config", "feature_counts", "best_val_loss", ...}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sae.config import SAEConfig, UserError


def read(checkpoint: Any, where: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    """The config and weights in a best_model.pt. Raises UserError for other contents."""
    if not isinstance(checkpoint, dict) or not {"sae_state_dict", "config"} <= checkpoint.keys():
        raise UserError(f"'{where}' has no sae_state_dict and config; give a best_model.pt or a run's folder")
    return SAEConfig.from_dict(checkpoint["config"]), checkpoint["sae_state_dict"]
