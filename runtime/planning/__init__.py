"""How an image of some size will be run, and what that takes: decided before anything is allocated.

planner.py plans for one network, within its memory budget. plan.py: whole, in tiles, by finer stages or in passes;
profiles.py: on a TensorRT plan. grid.py and tile_costs.py: which tiles there are, and what they cost; kept_rows.py:
what memory holds beside a tile; working_memory.py: which runs may go on together; batch_cost.py: what batches cost.
"""
