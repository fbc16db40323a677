"""Runs the engine that lies beside this file, on Triton's Python backend. Written by export-triton."""

import json
import site
import sys
from pathlib import Path

# A folder of Python packages, fcn_deploy's and NumPy's among them, where the server's Python does not find these: it
# knows nothing of virtual environments. (export-triton --site-packages)
SITE_PACKAGES = None

if SITE_PACKAGES:  # before the server imports its own helpers, which import NumPy
    before = [*sys.path]
    site.addsitedir(SITE_PACKAGES)
    sys.path[:] = [path for path in sys.path if path not in before] + before


class TritonPythonModel:
    """One instance: an engine opened in a process of its own."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        import triton_python_backend_utils as pb_utils

        self.pb = pb_utils
        self._check_tensors()
        try:
            from fcn_deploy import Segmenter
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"the server's Python cannot import fcn_deploy ({error}); install it there, or name where it is: "
                "export-triton --site-packages FOLDER"
            ) from error
        self.outputs = [output["name"] for output in config["output"]]
        on_gpu = args["model_instance_kind"] == "GPU"
        self.net = Segmenter(
            Path(args["model_repository"]) / args["model_version"] / "model.engine",
            device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "auto",
            threads=int(given["threads"]) if "threads" in given else None,
            memory=int(given["memory"]) if "memory" in given else None,
            refine=given.get("refine") == "true",
        )
        self.net.network.input_range = None  # tensors are in the network's own numbers, whatever its files' range is

    def execute(self, requests):
        """Answers of the requests that the server hands over together, of whatever sizes.

        They are labelled as one stream: reading and labelling overlap, and images of equal padded size are batched
        where that is measured to pay. Labels do not depend on what else is in work.
        """
        images = [self.pb.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        wanted = [set(request.requested_output_names()) & set(self.outputs) for request in requests]
        results = [{} for _ in requests]
        for kind in self.outputs:
            places = [place for place, kinds in enumerate(wanted) if kind in kinds]
            flat = [image for place in places for image in images[place]]
            answers = iter(self._answers(kind, flat))
            for place in places:
                results[place][kind] = [next(answers) for _ in images[place]]
        return [self._response(result) for result in results]

    def _answers(self, kind, images):
        """What the network gives for each image; the exception where it fails."""
        if kind != "scores":
            return self.net.map(images, kind=kind, return_exceptions=True)
        return [self._scores(image) for image in images]

    def _scores(self, image):
        try:
            return self.net.heatmap(image)
        except Exception as error:
            return error

    def _response(self, result):
        """Of one request: its outputs, or the first thing that went wrong, in one line."""
        import numpy as np

        from fcn_deploy import MisuseError

        failed = [one for several in result.values() for one in several if isinstance(one, Exception)]
        if failed:
            said = " ".join(str(failed[0]).split()) or type(failed[0]).__name__
            code = (
                self.pb.TritonError.INVALID_ARG if isinstance(failed[0], MisuseError) else self.pb.TritonError.INTERNAL
            )
            return self.pb.InferenceResponse(output_tensors=[], error=self.pb.TritonError(said, code))
        if not all(result.values()):
            said = "a request without an image; send [N, H, W, C] with N of at least 1"
            error = self.pb.TritonError(said, self.pb.TritonError.INVALID_ARG)
            return self.pb.InferenceResponse(output_tensors=[], error=error)
        tensors = [self.pb.Tensor(kind, np.ascontiguousarray(np.stack(several))) for kind, several in result.items()]
        return self.pb.InferenceResponse(output_tensors=tensors)

    def _check_tensors(self):
        """Servers built before NumPy 2 misread its arrays: images come as one value, answers go out without bytes."""
        import numpy as np

        values = np.arange(3, dtype=np.uint8)
        read = self.pb.Tensor.from_dlpack("probe", self.pb.Tensor("probe", values).to_dlpack()).as_numpy()
        if read.tobytes() != values.tobytes():
            raise self.pb.TritonModelException(
                f"this server misreads arrays of NumPy {np.__version__}; install 'numpy<2' where its Python looks, or "
                "take a later Triton"
            )

    def finalize(self):
        if hasattr(self, "net"):
            self.net.close()
