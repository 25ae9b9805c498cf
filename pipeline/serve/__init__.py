"""Tagging over HTTP, on Ray Serve."""
