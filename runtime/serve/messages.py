"""The protocol's gRPC messages, built from their description: nothing is generated, and no other package's are touched.

They are those of https://github.com/kserve/open-inference-protocol (open_inference_grpc.proto), and of
https://github.com/grpc/grpc/blob/master/doc/health-checking.md. They live in a pool of their own, so that a program
that has another copy of them, a client's, can import this too.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Fields = tuple[tuple[str, int, str], ...]

PARAMETERS = "map InferParameter"
NAME_AND_VERSION: Fields = (("name", 1, "string"), ("version", 2, "string"))
TENSOR: Fields = (("name", 1, "string"), ("datatype", 2, "string"), ("shape", 3, "repeated int64"))
FULL_TENSOR: Fields = (*TENSOR, ("parameters", 4, PARAMETERS), ("contents", 5, "InferTensorContents"))

# Message → (name, number, type) of its fields. A message within another has that one's name before it.
INFERENCE: dict[str, Fields] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": (("live", 1, "bool"),),
    "ServerReadyRequest": (),
    "ServerReadyResponse": (("ready", 1, "bool"),),
    "ModelReadyRequest": NAME_AND_VERSION,
    "ModelReadyResponse": (("ready", 1, "bool"),),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": (*NAME_AND_VERSION, ("extensions", 3, "repeated string")),
    "ModelMetadataRequest": NAME_AND_VERSION,
    "ModelMetadataResponse": (
        ("name", 1, "string"),
        ("versions", 2, "repeated string"),
        ("platform", 3, "string"),
        ("inputs", 4, "repeated ModelMetadataResponse.TensorMetadata"),
        ("outputs", 5, "repeated ModelMetadataResponse.TensorMetadata"),
    ),
    "ModelMetadataResponse.TensorMetadata": TENSOR,
    "ModelInferRequest": (
        ("model_name", 1, "string"),
        ("model_version", 2, "string"),
        ("id", 3, "string"),
        ("parameters", 4, PARAMETERS),
        ("inputs", 5, "repeated ModelInferRequest.InferInputTensor"),
        ("outputs", 6, "repeated ModelInferRequest.InferRequestedOutputTensor"),
        ("raw_input_contents", 7, "repeated bytes"),
    ),
    "ModelInferRequest.InferInputTensor": FULL_TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": (("name", 1, "string"), ("parameters", 2, PARAMETERS)),
    "ModelInferResponse": (
        ("model_name", 1, "string"),
        ("model_version", 2, "string"),
        ("id", 3, "string"),
        ("parameters", 4, PARAMETERS),
        ("outputs", 5, "repeated ModelInferResponse.InferOutputTensor"),
        ("raw_output_contents", 6, "repeated bytes"),
    ),
    "ModelInferResponse.InferOutputTensor": FULL_TENSOR,
    "InferParameter": (
        ("bool_param", 1, "oneof bool"),
        ("int64_param", 2, "oneof int64"),
        ("string_param", 3, "oneof string"),
        ("double_param", 4, "oneof double"),
        ("uint64_param", 5, "oneof uint64"),
    ),
    "InferTensorContents": (
        ("bool_contents", 1, "repeated bool"),
        ("int_contents", 2, "repeated int32"),
        ("int64_contents", 3, "repeated int64"),
        ("uint_contents", 4, "repeated uint32"),
        ("uint64_contents", 5, "repeated uint64"),
        ("fp32_contents", 6, "repeated float"),
        ("fp64_contents", 7, "repeated double"),
        ("bytes_contents", 8, "repeated bytes"),
    ),
}
# Method → the message that it takes; what it gives is called Response instead of Request.
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
SERVICE = "inference.GRPCInferenceService"

HEALTH: dict[str, Fields] = {
    "HealthCheckRequest": (("service", 1, "string"),),
    "HealthCheckResponse": (("status", 1, "int32"),),  # an enum there, which is an int32 on the wire
}
SERVING, NOT_SERVING = 1, 2


def _classes(package: str, messages: dict[str, Fields]) -> dict[str, Any]:
    """The class of each message."""
    file = descriptor_pb2.FileDescriptorProto(name=f"fcn_deploy/{package}.proto", package=package, syntax="proto3")
    made: dict[str, Any] = {}
    for full, fields in messages.items():
        outer, _, name = full.rpartition(".")
        made[full] = (made[outer].nested_type if outer else file.message_type).add(name=name)
        for field in fields:
            _add(made[full], f".{package}.{full}", package, *field)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {full: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{full}")) for full in messages}


def _add(message: Any, path: str, package: str, name: str, number: int, kind: str) -> None:
    """One field of a message's description; `path` is the message's full name."""
    proto = descriptor_pb2.FieldDescriptorProto
    *words, type_ = kind.split()
    field = message.field.add(name=name, number=number, label=proto.LABEL_OPTIONAL)
    if "repeated" in words or "map" in words:
        field.label = proto.LABEL_REPEATED
    if "oneof" in words:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if "map" in words:  # a map is a repeated message of a key and a value
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add(entry, "", package, "key", 1, "string")
        _add(entry, "", package, "value", 2, type_)
        field.type, field.type_name = proto.TYPE_MESSAGE, f"{path}.{entry.name}"
    elif type_[0].isupper():
        field.type, field.type_name = proto.TYPE_MESSAGE, f".{package}.{type_}"
    else:
        field.type = getattr(proto, f"TYPE_{type_.upper()}")


MESSAGES = _classes("inference", INFERENCE)
HEALTH_MESSAGES = _classes("grpc.health.v1", HEALTH)
