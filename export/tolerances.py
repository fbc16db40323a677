"""How far what was made of a model may be from the model, and why: every tolerance of export/ in one place.

Shares are of the range of the scores that are compared (highest less lowest), unless it says otherwise.
"""

import numpy as np

# Of the best two scores, or of a score and its threshold: nearer ones are in an order that float32's rounding decides,
# so that either label is right. Networks' float32 kernels stay within 1e-5 of each other.
DECISION_MARGIN = 1e-4

# Scores that are computed twice in float32 by the same operators, whose convolutions sum in another order: of an image
# in a batch, in tiles, or as a part of a larger image; and those of an engine against its model's.
REORDERED_SUMS = 1e-4

# Scores of one image, computed by one module before and after another image: what differs was kept from that.
SAME_IMAGE = 1e-5

# Scores of a model whose sizes were freed, at the size that it had: only arithmetic that was folded before is run anew.
FREED_SIZES = 1e-5

# Scores of a foreign model in the standard form: converted to a newer opset, in another layout, and batched.
STANDARD_FORM = 1e-3
# The same of a model in float16 or bfloat16, which is run in float32: its own scores have 11 bits, or 8.
STANDARD_FORM_OF_HALF = 3e-2
# Share of pixels whose score is the threshold itself, at which > and >= give other labels. By chance few are; of
# scores out of a Relu, many.
TIED_PIXELS = 0.01

# Scores in ONNX against PyTorch's. Rounding stays near 1e-6; what has a size baked in is off by far more.
EXPORTED_MODEL = 1e-3

# Absolute: a Sigmoid rounds values near 0 as coarsely as those near 1, whatever the range of what is compared.
SIGMOID_ROUNDING = 4 * float(np.finfo(np.float32).eps)

# Absolute, of probabilities: a Clip so near to 0 and 1 changes no label and no mask.
CLIPPED_PROBABILITY = 1e-5

# Absolute, of weights between 0 and 1: a transposed convolution that is bilinear interpolation, as trainers write it.
BILINEAR_WEIGHT = 1e-6

# Of a constant's largest magnitude: one that a graph made of its places by float32 arithmetic, computed again.
POSITION_CONSTANT = 4e-6

# Of the golden sample's scores by an engine on a user's machine, by precision: float32 rounds, and INT8 kernels may
# round a tie the other way, layer after layer. BF16 has 8 bits and FP8 4: an input that differs by 1e-6 moved scores of
# EfficientNet-Lite0 FCN-8s by 0.0064 in BF16, and by 0.032 in FP8 and FP16, of 0.072 that FP8 itself is from float32.
GOLDEN_SAMPLE = {"float32": 1e-3, "bf16": 5e-2, "float16": 2e-2, "fp8": 1e-1, "int8": 5e-2}
