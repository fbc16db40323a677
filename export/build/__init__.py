"""From an imported model to an engine file: cut off, partitioned, quantized, tuned, compared, measured."""
