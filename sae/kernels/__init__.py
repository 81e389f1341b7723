"""Selection of latents and sparse operations, each with a plain twin: C++ on CPUs, Triton on CUDA, torch everywhere.

Any room may use it. It imports nothing of sae, and knows no module and no config.
"""
