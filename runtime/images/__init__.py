"""Image and video files, in and out: no network is needed here.

find.py: which files; header.py: what a file says of itself; read.py: its pixels, as a card wants them, whole or in
parts, from pillow.py, deep.py, tiff.py or gdal.py; regions.py: files too large to be held; write.py: labels and maps;
overlay.py: pictures of them; video.py.
"""
