"""nanoSAE: train, evaluate, watch and steer sparse autoencoders on any PyTorch language model."""

from sae.config import VERSION as __version__
from sae.config import SAEConfig, TrainConfig
from sae.data.activations import ActivationCollector
from sae.evaluator import SAEEvaluator
from sae.feature_viz import FeatureVisualizer
from sae.formats.store import load_sae, load_saes, save_sae
from sae.lm.language_model import load_language_model
from sae.models import create_sae
from sae.neuronpedia import NeuronpediaClient
from sae.runtime import InterpretableModel
from sae.trainer import SAETrainer, train_sae_from_activations

__all__ = [
    "ActivationCollector",
    "FeatureVisualizer",
    "InterpretableModel",
    "NeuronpediaClient",
    "SAEConfig",
    "SAEEvaluator",
    "SAETrainer",
    "TrainConfig",
    "__version__",
    "create_sae",
    "load_language_model",
    "load_sae",
    "load_saes",
    "save_sae",
    "train_sae_from_activations",
]
