#!/usr/bin/env bash
# Arrays read from FITS, MGH, NIfTI or TIFF files that are big-endian reach ONNX Runtime and OpenCV byte by byte backwards.
#
# Seen with onnxruntime 1.32.0, opencv-python-headless 5.0.0.93, tract 0.23.9, MNN 3.6.1, openvino 2026.4.1; files read by
# astropy 8.0.2, nibabel 5.4.2, pillow 13.0.0. NumPy arrays carry their byte order in the dtype; readers keep the file's:
#   astropy, FITS; nibabel, MGH and big-endian NIfTI (dataobj)    >f4
#   Pillow, a 16-bit TIFF that is big-endian and compressed       >u2
# NumPy computes rightly with them. A call with such an array of 0 to 34:
#   ONNX Runtime run() and OrtValue, tract, MNN const, OpenVINO's ov.Tensor, cv2.resize and dnn    values around 1e-41 or
#                                                                                                  1e+38, or x 256 mod 65536
#   OpenVINO compiled([array])                                    right
#   torch.from_numpy, SimpleITK, onnx.numpy_helper                refuse it
# They look at the kind and the width of the type, not at the order. No error, no warning.
#
# Why it matters: segmentation of scans and of the sky is made of exactly these files. float32 is what the network wants,
# so that no astype comes between; x - mean in NumPy makes it native, a model with the normalisation inside does not. All
# values are nearly 0, or noise: one class everywhere, of the right shape. Reading with tifffile gives native values.
# Remedy: array.astype(array.dtype.newbyteorder("="), copy=False) before any library that is not NumPy.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 opencv-python-headless==5.0.0.93 tract==0.23.9 MNN==3.6.1 nibabel==5.4.2 astropy==8.0.2 \
    pillow==13.0.0 tifffile==2026.3.3
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import astropy, cv2, nibabel, numpy as np, onnx, onnxruntime as ort, openvino as ov, tifffile, tract
import MNN.expr
from astropy.io import fits
from onnx import TensorProto, helper
from PIL import Image

print("numpy", np.__version__, "onnxruntime", ort.__version__, "opencv", cv2.__version__, "openvino",
      ov.__version__.split("-")[0], "nibabel", nibabel.__version__, "astropy", astropy.__version__)
work = sys.argv[1]
native = np.arange(35, dtype=np.float32).reshape(5, 7)
fits.PrimaryHDU(native).writeto(work + "/a.fits")
nibabel.save(nibabel.MGHImage(native[..., None], np.eye(4)), work + "/a.mgh")
nibabel.save(nibabel.Nifti1Image(native[..., None], np.eye(4), nibabel.Nifti1Header(endianness=">")), work + "/a.nii")
tifffile.imwrite(work + "/a.tif", native.astype(np.uint16), byteorder=">", compression="zlib")
read = {"astropy, FITS": fits.getdata(work + "/a.fits"),
        "nibabel, MGH": np.asarray(nibabel.load(work + "/a.mgh").dataobj)[..., 0],
        "nibabel, big-endian NIfTI": np.asarray(nibabel.load(work + "/a.nii").dataobj)[..., 0],
        "pillow, big-endian TIFF": np.array(Image.open(work + "/a.tif"))}
for title, array in read.items():
    print(f"{title}: dtype {array.dtype.str}, row 0 {array[0, :4].tolist()}")
    if not array.dtype.str.startswith(">") or not np.array_equal(array, native):
        sys.exit("not seen any more: the reader gives native arrays")

shape = [1, 1, "H", "W"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu",
                          [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                          [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
onnx.save(model, work + "/relu.onnx")
session = ort.InferenceSession(model.SerializeToString())
core = ov.Core()
compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
net = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
tract_model = tract.onnx().load(work + "/relu.onnx").into_model().into_runnable()


def opencv_dnn(x):
    net.setInput(x)
    return net.forward()


calls = {"onnxruntime run": lambda x: session.run(None, {"x": x})[0],
         "onnxruntime OrtValue": lambda x: ort.OrtValue.ortvalue_from_numpy(x).numpy(),
         "tract": lambda x: tract_model.run([x])[0].to_numpy(), "MNN const": lambda x: MNN.expr.const(x, list(x.shape)).read(),
         "openvino Tensor": lambda x: ov.Tensor(x).data, "openvino call": lambda x: compiled([x])[0],
         "cv2.dnn": opencv_dnn, "cv2.resize": lambda x: cv2.resize(x[0, 0], (7, 5))}
big = read["astropy, FITS"][None, None]
for title, call in calls.items():
    right = np.array_equal(np.ravel(call(native[None, None])), np.ravel(native))
    got = np.array(np.ravel(call(big)))
    print(f"{title}: native {'right' if right else 'wrong'}, big-endian {got[:4].tolist()}")
    if not right or np.array_equal(got, np.ravel(native)) != (title == "openvino call"):
        sys.exit(f"not seen any more: {title} minds the byte order, or OpenVINO's call no longer does")
got = cv2.resize(read["pillow, big-endian TIFF"], (7, 5))[0]
print("cv2.resize of the TIFF that Pillow read:", got[:4].tolist())
if got[1] != 256:
    sys.exit("not seen any more: OpenCV minds the byte order of uint16")
EOF
