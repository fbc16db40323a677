"""From coarse scores to results of the image's own size, exactly.

heads.py: the outputs of an engine, each with results of its own kinds; upsampling.py: results of each kind, of the rows
of a window (score_window.py); argmax.py: labels, interpolated only where classes meet; refine.py: labels whose borders
follow the image's; resize_axis.py: where pixels read along an axis.
"""
