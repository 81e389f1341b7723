"""Conversations with a watched and steered model, and the page they are held on.

The chat command comes in. It knows no training.
"""
