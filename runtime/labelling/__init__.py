"""Files labelled with a Network: what label-images does, for programs too.

files.py: label_files, for any of them; jobs.py: what goes where; pictures.py, videos.py; regions.py: one too large to
be held; rle.py: masks as COCO's run lengths.
"""
