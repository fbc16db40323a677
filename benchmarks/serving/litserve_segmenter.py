"""LitServe with a Segmenter, for benchmarks/serving: `python -m benchmarks.serving.litserve_segmenter cam.engine PORT`.

An .npy file comes as a form's field, as LitServe takes no raw arrays, and the labels' bytes go back. It has as many
workers as serve-engine has lanes.
"""

import io
import sys

import litserve
import numpy as np
from fastapi import Response
from fcn_deploy.runtime.stream import CALLERS

from fcn_deploy import Segmenter


class Api(litserve.LitAPI):
    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine = engine

    def setup(self, device):
        self.net = Segmenter(self.engine)

    def decode_request(self, request):
        return np.load(io.BytesIO(request["request"].file.read()))

    def predict(self, image):
        return self.net(image)

    def encode_response(self, labels):
        return Response(labels.tobytes())


if __name__ == "__main__":
    server = litserve.LitServer(Api(sys.argv[1]), accelerator="cpu", workers_per_device=CALLERS)
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="error")
