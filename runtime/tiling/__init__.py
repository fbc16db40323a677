"""An image run in tiles: stage by stage, from row to row, and networks that pool in passes."""
