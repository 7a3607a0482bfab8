"""An alias of `vpt_model.Model` that warns; it goes with version 0.3."""

import warnings

from vpt_model.network.model import Model

__all__ = ["Model"]
warnings.warn("vpt_model.model has moved: use `from vpt_model import Model`", DeprecationWarning, stacklevel=2)
