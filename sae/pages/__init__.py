"""What a feature means, from tables to pages: records, labels, explanations, dashboards, Neuronpedia's payloads.

feature_viz and neuronpedia come in. It knows no training.
"""
