"""Data preparation, inspection and training on Ray.

The modules here are what these packages share (files, locks, Parquet, the prepared data set), one subject per file.
"""
