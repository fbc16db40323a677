"""INT8 and FP16 that keep their accuracy."""
