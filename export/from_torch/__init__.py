"""export-onnx: a PyTorch network as portable ONNX that takes every size, verified against PyTorch.

A module is traced at one size (network.py) by one of PyTorch's exporters (exporters.py). What that wrote is tried,
freed of sizes, padded or given up for the other's until it takes every size (every_size.py), and is compared with
PyTorch at many that were never traced (verify.py). export.py does all of it and writes the file.
"""

from fcn_deploy.export.from_torch.export import export_module
from fcn_deploy.export.from_torch.verify import VERIFIED_SIZES, SizeDifference

__all__ = ["VERIFIED_SIZES", "SizeDifference", "export_module"]
