"""The demo agents: four small models and ten workflows that a reader can run from a clean clone.

Knows the models in the repository's `models/` and what is said to them; measures nothing that a bench promises.
"""
