"""From text to batches of activations: datasets, tokens, streams, the mixing buffer, caches, activation files.

Training and evaluation come in. It knows no SAE.
"""
