"""Lets torchvision be imported beside a torch for the CPU where only its build for CUDA is to be had.

Its operators are then missing, and with them the names that it attaches meta functions to. Nothing here uses them; they
are declared without an implementation before torchvision asks for them. Python runs this file at its start, where its
folder is on the path.
"""

import importlib.abc
import importlib.util
import re
import sys
from pathlib import Path

_WANTING = "torchvision._meta_registrations"


class _Declare(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path, target=None):
        if name != _WANTING:
            return None
        sys.meta_path.remove(self)
        import torch

        spec = importlib.util.find_spec(name)
        _Declare.library = torch.library.Library("torchvision", "FRAGMENT")
        source = Path(spec.origin).read_text()
        for operator in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source))):
            if not hasattr(torch.ops.torchvision, operator):
                _Declare.library.define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")
        return spec


sys.meta_path.insert(0, _Declare())
