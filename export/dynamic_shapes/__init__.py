"""Frees the height and width that are baked into a graph, and proves that nothing else changed."""
