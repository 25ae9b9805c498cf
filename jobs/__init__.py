"""The commands, one per file, and what they share: options, the process (`entry`) and Ray (`ray_session`).

A command parses its options and calls a function of `pipeline`. It holds no other logic.
"""
