"""Transformations of a model, one a file: each takes a ModelProto and gives a PassResult. What only looks is in
`analysis`.

By who uses them:

Imports, towards the standard form (importer/): resolve_branches, raise_opset, as_float32, explicit_padding,
    floor_pooling, cancel_transposes, image_input, add_batch, reverse_channels, cut_decision and its as_argmax
Imports, towards images of every size (importer/fit_images.py): pad_and_crop, resize_to_multiple, upsample_scores,
    drop_idle, resize_by_factor; from PyTorch nearest_as_pytorch
Every core (build/core.py): split_head, bilinear_deconv, fold_constants, fold_scales, fuse_padding, hard_sigmoid,
    hard_swish
Cores in tiles and stages (build/): open_pooling, without_resizing, mean_in_steps, dequantize_late
Low precision (build/low_precision.py) and one kind of target (build/targets/): pooling_as_convolution, raw_input,
    space_to_depth, widen_groups
An ONNX that labels by itself (build/standalone.py): fold_input, fold_decision
"""
