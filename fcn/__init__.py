"""Fully convolutional networks in PyTorch: model, training, evaluation, checkpoints."""
