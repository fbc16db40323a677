"""export-onnx, build-engine and inspect-model, one file a command."""
