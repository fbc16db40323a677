"""From an imported model to an engine file: cut off, quantized, cut into stages, tuned, compared, measured."""
