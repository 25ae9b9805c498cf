"""Tagging: recordings of any length → windows → scores, events and embeddings, in this process or on Ray.

The folder has many modules because each step is one file: inputs, the plan of the work, windows, prediction, events,
tables, label files, the report. The steps that Ray runs and those that a terminal runs are the same.
"""
