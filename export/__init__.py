"""From PyTorch to ONNX, and from ONNX to engines."""
