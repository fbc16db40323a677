"""Backends: one library that runs networks a file, with the same few verbs."""
