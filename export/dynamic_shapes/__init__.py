"""Frees the height and width that are baked into a graph, and proves that nothing else changed.

An exporter that runs a network at 64×96 may write `Resize to [1, 8, 16, 24]` where the network meant `twice its
input`, or `the size of that skip`. The number 24 alone does not tell; the whole graph does. So the shape of every
tensor is followed for five sample images at once (sizes.py, traced_graph.py, propagate.py): 24 is then a *size*, as
(24, 24, 24, 56, 40) is, which tells W/4 from a constant. Where a node's number does not follow the image, its operator
offers *interpretations* of it (ops/, a file for each family: W/4, 2·W/8, or 24 as it stands), and the solver
(solver.py) searches for the choice with which the whole network fits and the scores follow the image. If two choices
fit and neither is the usual one, the network is refused. What was chosen is written as arithmetic on shapes
(shape_writer.py), and the result is compared with the model it was made from (compare_with_source.py).

    from fcn_deploy.export.dynamic_shapes.free_sizes import free_sizes
    freed = free_sizes(onnx.load("static.onnx"))
    freed.notes  # ("Resize up1: to 2 by 2 times its input's size instead of 16 by 24", ...)
"""
