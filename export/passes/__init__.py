"""Transformations of a model, a verb a file: each takes a ModelProto and gives a PassResult. What only looks is in
`analysis`.
"""
