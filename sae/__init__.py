"""nanoSAE: train, evaluate, watch and steer sparse autoencoders on any PyTorch language model.

Importing it loads no torch: public names and modules load when they are first used.
"""

import importlib.abc
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sae import formats
from sae.config import VERSION as __version__

if TYPE_CHECKING:  # mypy and editors read these, Python reads _PUBLIC
    from sae.data.collector import ActivationCollector as ActivationCollector
    from sae.evaluator import SAEEvaluator as SAEEvaluator
    from sae.feature_viz import FeatureVisualizer as FeatureVisualizer
    from sae.formats.store import load_sae as load_sae
    from sae.formats.store import load_saes as load_saes
    from sae.formats.store import save_sae as save_sae
    from sae.lm.language_model import load_language_model as load_language_model
    from sae.models import SAEConfig as SAEConfig
    from sae.models import TrainConfig as TrainConfig
    from sae.models import create_sae as create_sae
    from sae.neuronpedia import NeuronpediaClient as NeuronpediaClient
    from sae.runtime import InterpretableModel as InterpretableModel
    from sae.trainer import SAETrainer as SAETrainer
    from sae.trainer import train_sae_from_activations as train_sae_from_activations

_PUBLIC = {
    "ActivationCollector": "data.collector",
    "FeatureVisualizer": "feature_viz",
    "InterpretableModel": "runtime",
    "NeuronpediaClient": "neuronpedia",
    "SAEConfig": "models",  # a config is checked against the kinds, which models.py knows
    "SAEEvaluator": "evaluator",
    "SAETrainer": "trainer",
    "TrainConfig": "models",
    "create_sae": "models",
    "load_language_model": "lm.language_model",
    "load_sae": "formats.store",
    "load_saes": "formats.store",
    "save_sae": "formats.store",
    "train_sae_from_activations": "trainer",
}
_ROOMS = {  # files that once were in sae/ itself
    "chat": "conversation server",
    "data": "activation_files activations buffer cache datasets tokens",
    "kernels": "native selection triton_encoder triton_kernels",
    "lm": "language_model nanochat tokenizers",
    "pages": "dashboard directions explainer feature_tables labels neuronpedia_format records syntax",
}
_MOVED = {name: f"{room}.{name}" for room, names in _ROOMS.items() for name in names.split()}
_MOVED |= {"assessment": "evaluator", "commands": "config", "stopwatch": "log", "sweep": "plots"}
__all__ = ["__version__"]
__all__ += list(_PUBLIC)


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Old import paths: `import sae.datasets` gives the module sae.data.datasets itself."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        package, _, name = fullname.partition(".")
        new = _MOVED.get(name) if package == "sae" else None
        return ModuleSpec(fullname, self, loader_state=f"sae.{new}") if new else None

    def create_module(self, spec: ModuleSpec) -> Any:
        module = import_module(spec.loader_state)
        spec.loader_state = module.__spec__  # the import is about to replace it
        return module

    def exec_module(self, module: Any) -> None:
        module.__spec__ = module.__spec__.loader_state


def _of_formats(name: str) -> Any:
    """What sae/formats.py had: `from sae.formats import load_sae`."""
    for new in ("formats.store", "files") if name[0] != "_" else ():
        if name in vars(import_module(f"sae.{new}")):
            return vars(sys.modules[f"sae.{new}"])[name]
    raise AttributeError(f"module 'sae.formats' has no attribute '{name}'")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"sae.{_PUBLIC[name]}"), name)
    elif find_spec(f"sae.{name}"):
        value = import_module(f"sae.{name}")
    else:
        raise AttributeError(f"module 'sae' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.meta_path.append(_Moved())
vars(formats)["__getattr__"] = _of_formats
