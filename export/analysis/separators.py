"""Where a network can be cut in two: feature maps that all paths from the image to the scores go through."""

from fcn_deploy.export.graph.edit import names_read
from onnx import ModelProto


def separators(core: ModelProto) -> list[str]:
    """The names of those feature maps, in the order of the nodes."""
    image, scores = core.graph.input[0].name, core.graph.output[0].name
    reads = [names_read(node) for node in core.graph.node]
    last = {name: index for index, names in enumerate(reads) for name in names}  # who reads it last
    of_image, alive = {image}, {image}
    found: list[str] = []
    for index, (node, names) in enumerate(zip(core.graph.node, reads, strict=True)):
        if not of_image.isdisjoint(names):
            made = {name for name in node.output if name}
            of_image |= made
            alive |= {name for name in made if last.get(name, -1) > index or name == scores}
            alive -= {name for name in names if last[name] == index and name != scores}
            if len(alive) == 1 and alive != {scores}:
                found += alive
    return found
