#!/usr/bin/env bash
# A label map that Zarr wrote in its format 2 has no class 0 in xarray: it is NaN, and the labels are float32.
#
# Seen with xarray 2026.9.0, zarr 3.1.6, numpy 2.4.6. The classes 0 to 4 as uint8, written by zarr with its defaults and
# opened by xarray.open_zarr with its defaults:
#   format 3                        uint8      0 1 2 3 4
#   format 2                        float32    nan 1 2 3 4
#   format 2, written by xarray     uint8      0 1 2 3 4
# Zarr's fill_value says what a chunk holds that was never written, and zarr sets it to 0 unasked; of format 2, xarray
# takes the same number for "missing" (CF's _FillValue). zarr itself reads 0 to 4. Nothing warns.
#
# Why it matters: the background is what disappears. Means and counts leave it out, NaN == 0 is False, astype("uint8") is
# undefined for NaN, and an IoU that counts labels >= 0 has lost its largest class. A store that was converted from
# format 3 to 2, or opened by other code, is the same data with other labels. OME-Zarr before 0.5 is format 2.
# Remedy: open_zarr(..., mask_and_scale=False), or format 3. use_zarr_fill_value_as_mask=False does not help for format 2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 xarray==2026.9.0 zarr==3.1.6
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import numpy as np, xarray, zarr

print("xarray", xarray.__version__, "zarr", zarr.__version__)
labels = np.arange(5, dtype=np.uint8)[None].repeat(4, 0)


def written_by_zarr(version):
    path = f"{sys.argv[1]}/zarr{version}"
    names = {"dimension_names": ("y", "x")} if version == 3 else {}
    group = zarr.open_group(path, mode="w", zarr_format=version)
    array = group.create_array("labels", shape=labels.shape, chunks=(2, 2), dtype="uint8", **names)
    if version == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["y", "x"]
    array[:] = labels
    if not np.array_equal(zarr.open_group(path, mode="r")["labels"][:], labels):
        sys.exit("not seen any more: zarr itself reads something else")
    return path


def read(path, **options):
    found = xarray.open_zarr(path, consolidated=False, **options)["labels"]
    print(path.rsplit("/")[-1], options or "", found.dtype, found.values[0])
    return found.values


theirs = f"{sys.argv[1]}/xarray2"
xarray.Dataset({"labels": (("y", "x"), labels)}).to_zarr(theirs, zarr_format=2, consolidated=False)
of_2, right = written_by_zarr(2), [read(written_by_zarr(3)), read(theirs)]
wrong = read(of_2)
right += [read(of_2, mask_and_scale=False)]
read(of_2, use_zarr_fill_value_as_mask=False)
if not all(each.dtype == np.uint8 and np.array_equal(each, labels) for each in right):
    sys.exit("not seen any more: format 3, xarray's own store or the remedy is not right")
if wrong.dtype != np.float32 or not np.array_equal(np.isnan(wrong), labels == 0):
    sys.exit("not seen any more: class 0 of format 2 is there")
EOF
