"""Segmentation ONNX from anywhere, brought into the standard form that engines are built from."""
