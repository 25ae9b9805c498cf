"""Training on Ray Train: from a recipe and a prepared data set to a run's folder.

The modules here are the parts of a run: settings, folder, workers, checkpoints and logs. Reading data and evaluation
are packages.
"""
