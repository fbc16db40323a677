"""What analyses and passes stand on.

Between packages a model is an `onnx.ModelProto`. Analyses read it through `index`, which looks everything up once;
passes edit it through `rewrite`, as onnx_ir holds it; `edit` has what is done to a ModelProto at once.
"""
