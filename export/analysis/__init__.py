"""What a graph does, found without changing it: receptive fields, and the sizes that it takes."""
