"""Transformations of a model, one a file: each takes a ModelProto and gives a PassResult. What only looks is in
`analysis`.
"""
