"""Conversations with a watched and steered model, and the web page for them.

The chat command comes in. It knows no training.
"""
