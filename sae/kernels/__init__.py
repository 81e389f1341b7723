"""Selection of latents and sparse operations, each with a plain twin: C++ on CPUs, Triton on CUDA, torch everywhere.

Anyone may come in. It imports nothing of sae, and knows no module and no config.
"""
