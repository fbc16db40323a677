"""report.html of build-engine and eval-fcn, drawn from plain data: it needs neither torch nor onnx."""
