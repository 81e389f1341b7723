"""SAEs on disk: our own layout, which is SAELens's, and one file for each other format.

Everyone who loads or saves an SAE comes in. It knows no training and no text.
"""
