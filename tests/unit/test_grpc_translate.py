"""gRPC's messages against tritonclient's own, and their way through HTTP's bodies and back."""

import contextlib
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from protocol_models import SOME_PIXELS, SOME_PNG, digits, single
from tritonclient import grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.grpc._utils import _get_inference_request

from cluster.errors import BadRequest, TandemError, TooLarge, Unprocessable
from cluster.signature import NUMPY_DTYPES, Signature, Tensor
from serving.grpc import translate
from serving.grpc.messages import MESSAGES, PACKAGE, ModelInferRequest, message_class
from serving.grpc.translate import from_http, read_infer_request, to_http
from serving.protocol.codec import Codec
from serving.protocol.metadata import model_metadata, server_metadata
from serving.protocol.requests import HEADER_LENGTH, InferRequest

MAX_BYTES = 1_000_000
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def described(descriptor: Any) -> dict[str, Any]:
    """Fields of a message by name: what decides how it is written."""
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.containing_oneof.name if field.containing_oneof else None,
            field.message_type.full_name if field.message_type else None,
            described(field.message_type)
            if field.message_type and field.message_type.GetOptions().map_entry
            else None,
        )
        for field in descriptor.fields
    }


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_is_the_public_one(name: str) -> None:
    theirs = service_pb2.DESCRIPTOR.pool.FindMessageTypeByName(f"{PACKAGE}.{name}")
    assert described(message_class(name).DESCRIPTOR) == described(theirs)


def values_of(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    if dtype == "BYTES":
        return arrays(object, shape, elements=TEXTS)
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("FP") else None
    return arrays(NUMPY_DTYPES[dtype], shape, elements=elements)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    dtype = draw(st.sampled_from(sorted(NUMPY_DTYPES)))
    return dtype, draw(values_of(dtype, draw(array_shapes(min_dims=1, max_dims=3, max_side=4))))


def asked_with(dtype: str, array: np.ndarray, **options: Any) -> bytes:
    """A request as tritonclient sends it."""
    item = triton.InferInput("x", list(array.shape), dtype)
    item.set_data_from_numpy(np.char.encode(array.astype(str)).astype(object) if dtype == "BYTES" else array)
    unset: dict[str, Any] = {
        **{"model_version": "", "request_id": "", "outputs": None, "parameters": None},
        **{"sequence_id": 0, "sequence_start": False, "sequence_end": False, "priority": 0, "timeout": None},
    }
    message = _get_inference_request(model_name="m", inputs=[item], **(unset | options))
    return bytes(message.SerializeToString())


def parsed(message: bytes, signature: Signature, max_bytes: int = MAX_BYTES) -> InferRequest:
    body, json_bytes = to_http(read_infer_request(message), max_bytes)
    return Codec(signature, "m").parse_oip(body, {HEADER_LENGTH: str(json_bytes).encode()})


def typed(dtype: str, shape: list[int], name: str = "x", **contents: Any) -> bytes:
    tensor = {"name": name, "datatype": dtype, "shape": shape, "contents": contents}
    return bytes(ModelInferRequest(model_name="m", inputs=[tensor]).SerializeToString())


@given(tensors())
def test_raw_tensors_of_every_datatype_arrive(found: tuple[str, np.ndarray]) -> None:
    dtype, array = found
    got = parsed(asked_with(dtype, array), single(dtype, array.shape[1:]))
    np.testing.assert_array_equal(got.inputs["x"], array)
    assert got.inputs["x"].dtype == array.dtype


@given(tensors().filter(lambda found: found[0] != "FP16"))
def test_typed_tensors_of_every_datatype_arrive(found: tuple[str, np.ndarray]) -> None:
    dtype, array = found
    flat = array.reshape(-1).tolist()
    values = [text.encode() for text in flat] if dtype == "BYTES" else flat
    got = parsed(
        typed(dtype, list(array.shape), **{TYPED_FIELDS[dtype]: values}), single(dtype, array.shape[1:])
    )
    np.testing.assert_array_equal(got.inputs["x"], array)


@given(tensors())
def test_answers_of_every_datatype_arrive(found: tuple[str, np.ndarray]) -> None:
    dtype, array = found
    output = Tensor(name="y", dtype=dtype, shape=(-1, *array.shape[1:]))
    signature = single().model_copy(update={"outputs": (output,)})
    codec = Codec(signature, "m")
    asked = read_infer_request(asked_with("FP32", np.zeros((1, 4), np.float32), request_id="r"))
    body, json_bytes = to_http(asked, MAX_BYTES)
    request = codec.parse_oip(body, {HEADER_LENGTH: str(json_bytes).encode()})
    answer, headers = codec.render_oip({"y": array}, request=request, version="7")
    message = service_pb2.ModelInferResponse.FromString(from_http(answer, dict(headers)).SerializeToString())
    assert (message.model_name, message.model_version, message.id) == ("m", "7", "r")
    got = triton.InferResult(message).as_numpy("y")
    texts = np.vectorize(lambda value: value.decode(), otypes=[object])
    np.testing.assert_array_equal(texts(got) if dtype == "BYTES" else got, array)


def test_parameters_outputs_and_id_go_along() -> None:
    message = asked_with(
        "FP32",
        np.zeros((1, 4), np.float32),
        request_id="r-1",
        outputs=[triton.InferRequestedOutput("value")],
        priority=1,
        timeout=250_000,
        parameters={"flag": True, "text": "a", "part": 0.5, "count": -3},
    )
    got = parsed(message, single())
    given = {"flag": True, "text": "a", "part": 0.5, "count": -3, "priority": 1, "timeout": 250_000}
    assert got.parameters == given | {"binary_data_output": True}
    assert (got.request_id, [(spec.name, spec.binary) for spec in got.outputs]) == ("r-1", [("value", True)])


def test_images_may_be_files_or_pixels() -> None:
    as_file = parsed(typed("BYTES", [1], "image", bytes_contents=[SOME_PNG]), digits())
    np.testing.assert_array_equal(as_file.inputs["image"][0, :, :, 0], SOME_PIXELS)
    pixels = SOME_PIXELS.reshape(1, 8, 8, 1)
    as_pixels = parsed(
        typed("UINT8", [1, 8, 8, 1], "image", uint_contents=pixels.reshape(-1).tolist()), digits()
    )
    np.testing.assert_array_equal(as_pixels.inputs["image"], pixels)


BAD: list[tuple[type[TandemError], str, bytes]] = [
    (BadRequest, "can't be read", b"\xff\xff"),
    (Unprocessable, "a value it does not take", typed("INT8", [1, 4], int_contents=[1, 2, 3, 128])),
    (BadRequest, "another field", typed("FP32", [1, 4], fp64_contents=[1, 2, 3, 4])),
    (BadRequest, "another field", typed("FP32", [1, 4], fp32_contents=[1], int_contents=[1])),
    (Unprocessable, "no typed contents", typed("FP16", [1, 4], fp32_contents=[1, 2, 3, 4])),
    (Unprocessable, "another data type", typed("COMPLEX", [1, 4])),
    (BadRequest, "another size than its shape", typed("FP32", [1, 4], fp32_contents=[1, 2, 3])),
    (BadRequest, "another size than its shape", typed("FP32", [1, 4])),
    (BadRequest, "shape", typed("FP32", [-1, 4], fp32_contents=[1])),
    (TooLarge, "too large", typed("FP32", [1, 4], fp32_contents=[0.0] * 300_000)),
    (TooLarge, "too large", typed("BYTES", [1, 4], bytes_contents=[b""] * 300_000)),
]


@pytest.mark.parametrize(("kind", "match", "message"), BAD)
def test_what_contradicts_itself_is_refused(kind: type[TandemError], match: str, message: bytes) -> None:
    with pytest.raises(kind, match=match):
        parsed(message, single())


@given(st.integers(0, 40).filter(lambda size: size != 16))
def test_raw_contents_of_another_size_are_refused(size: int) -> None:
    message = ModelInferRequest.FromString(asked_with("FP32", np.zeros((1, 4), np.float32)))
    message.raw_input_contents[0] = bytes(size)
    with pytest.raises(BadRequest):
        parsed(message.SerializeToString(), single())


def test_raw_and_typed_contents_exclude_each_other() -> None:
    message = ModelInferRequest.FromString(asked_with("FP32", np.zeros((1, 4), np.float32)))
    message.raw_input_contents.append(b"")
    with pytest.raises(BadRequest, match="one entry for each input"):
        to_http(message, MAX_BYTES)
    del message.raw_input_contents[1]
    message.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    with pytest.raises(BadRequest, match="twice"):
        to_http(message, MAX_BYTES)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_refused(message: bytes) -> None:
    with contextlib.suppress(BadRequest):
        parsed(message, single())


def test_metadata() -> None:
    server = translate.server_metadata(server_metadata())
    assert (server.name, list(server.extensions)) == ("tandem", ["binary_tensor_data"])
    document = model_metadata("m", ["3"], digits(), "onnx")
    model = translate.model_metadata(document)
    assert (model.name, list(model.versions), model.platform) == ("m", ["3"], "onnx")
    shown = orjson.loads(document)["inputs"][0]
    assert (model.inputs[0].datatype, list(model.inputs[0].shape)) == (shown["datatype"], shown["shape"])
