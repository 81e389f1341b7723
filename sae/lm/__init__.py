"""Language models behind one face: pygpt, nanoGPT, nanochat, HuggingFace, and their tokenizers.

Everyone who needs a model comes in through language_model. It knows no SAE.
"""
