"""SAEs on disk: our own layout, which is SAELens's, and a file for each foreign one.

Everyone who loads or saves an SAE comes in. It knows no training and no text.
"""
