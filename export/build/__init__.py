"""From an imported model to an engine file: partitioned, lowered, tuned, compared, measured."""
