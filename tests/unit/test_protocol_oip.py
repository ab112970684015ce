"""Open Inference Protocol requests and answers, held against tritonclient's own encoder and decoder."""

import base64

import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from protocol_models import SOME_PIXELS, SOME_PNG, digits, single, table
from tritonclient.http._utils import _get_inference_request

from cluster.signature import NUMPY_DTYPES, DataType, Signature, Tensor
from serving.protocol.codec import Codec
from serving.protocol.metadata import server_metadata
from serving.protocol.requests import InferRequest, OutputSpec

LENGTH = b"inference-header-content-length"
NUMBERS = [dtype for dtype in NUMPY_DTYPES if dtype != "BYTES"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def encoded(
    tensors: dict[str, tuple[str, np.ndarray]],
    *,
    is_binary: bool,
    outputs: list[triton.InferRequestedOutput] | None = None,
    request_id: str = "",
) -> tuple[bytes, dict[bytes, bytes]]:
    """Body and headers as tritonclient sends them."""
    inputs = []
    for name, (datatype, array) in tensors.items():
        item = triton.InferInput(name, list(array.shape), datatype)
        inputs.append(item.set_data_from_numpy(array, binary_data=is_binary))
    body, length = _get_inference_request(inputs, request_id, outputs, 0, False, False, 0, None, None)
    return body, {} if length is None else {LENGTH: str(length).encode()}


def decoded(body: bytes, headers: list[tuple[bytes, bytes]]) -> triton.InferResult:
    length = dict(headers).get(LENGTH)
    return triton.InferResult.from_response_body(body, header_length=length and int(length))


def values_of(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    if dtype == "BYTES":
        return arrays(object, shape, elements=TEXTS)
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("FP") else None
    return arrays(NUMPY_DTYPES[dtype], shape, elements=elements)


@st.composite
def typed_arrays(draw: st.DrawFn) -> tuple[DataType, np.ndarray]:
    dtype = draw(st.sampled_from(sorted(NUMPY_DTYPES)))
    shape = draw(array_shapes(min_dims=1, max_dims=3, max_side=4))
    return dtype, draw(values_of(dtype, shape))


@given(typed=typed_arrays(), is_binary=st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_tritonclient_sends_arrives_unchanged(
    typed: tuple[DataType, np.ndarray], is_binary: bool
) -> None:
    dtype, array = typed
    is_binary |= dtype == "FP16"
    body, headers = encoded({"x": (dtype, array)}, is_binary=is_binary)
    request = Codec(single(dtype, array.shape[1:]), "m").parse_oip(body, headers)
    assert request.rows == len(array)
    found = request.inputs["x"]
    assert found.dtype == NUMPY_DTYPES[dtype]
    assert found.flags.aligned
    np.testing.assert_array_equal(found, array)
    assert dtype != "BYTES" or {type(text) for text in found.flat} == {str}


@given(typed=typed_arrays(), is_binary=st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_is_answered_tritonclient_reads_unchanged(
    typed: tuple[DataType, np.ndarray], is_binary: bool
) -> None:
    dtype, array = typed
    output = Tensor(name="y", dtype=dtype, shape=(-1, *array.shape[1:]))
    signature = Signature(task="t", inputs=single().inputs, outputs=(output,))
    request = InferRequest(inputs={}, rows=len(array), outputs=(OutputSpec("y", is_binary),))
    body, headers = Codec(signature, "m").render_oip({"y": array}, request=request, version="12")
    result = decoded(body, headers)
    found = result.as_numpy("y")
    if dtype == "BYTES":
        found = np.array([x.decode() if isinstance(x, bytes) else x for x in found.flat], object)
        found = found.reshape(array.shape)
    np.testing.assert_array_equal(found, array)
    assert result.get_response()["model_version"] == "12"


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_table_of_columns(is_binary: bool) -> None:
    body, headers = encoded(
        {
            "owner": ("BOOL", np.array([[True], [False]])),
            "city": ("BYTES", np.array([["Köln"], [""]], object)),
            "age": ("INT64", np.array([3, -(2**24)])),
            "rooms": ("INT64", np.array([[2**63 - 1], [-(2**63)]])),
        },
        is_binary=is_binary,
        request_id="abc",
    )
    request = Codec(table(), "m").parse_oip(body, headers)
    assert (request.rows, request.request_id) == (2, "abc")
    assert {name: array.tolist() for name, array in request.inputs.items()} == {
        "owner": [[True], [False]],
        "city": ["Köln", ""],
        "age": [3.0, -(2.0**24)],
        "rooms": [2**63 - 1, -(2**63)],
    }
    assert request.inputs["age"].dtype == np.float32


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("FP32", "FP64"),
        ("FP32", "INT64"),
        ("FP32", "INT32"),
        ("FP64", "FP32"),
        ("FP64", "INT64"),
        ("FP16", "FP32"),
    ],
)
def test_a_float_input_takes_what_libraries_send(target: DataType, sent: str, is_binary: bool) -> None:
    array = np.array([[1, -2, 3, 0]], NUMPY_DTYPES[sent])
    body, headers = encoded({"x": (sent, array)}, is_binary=is_binary)
    found = Codec(single(target), "m").parse_oip(body, headers).inputs["x"]
    assert found.dtype == NUMPY_DTYPES[target]
    np.testing.assert_array_equal(found, array)


def test_fp64_is_rounded_to_fp32() -> None:
    body, headers = encoded({"x": ("FP64", np.full((1, 4), 0.1))}, is_binary=True)
    assert Codec(single(), "m").parse_oip(body, headers).inputs["x"][0, 0] == np.float32(0.1)


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT64"])
def test_null_is_nan_in_a_nullable_input(datatype: str) -> None:
    entry = {"name": "x", "shape": [1, 4], "datatype": datatype, "data": [None, 2, None, 4]}
    body = orjson.dumps({"inputs": [entry]})
    found = Codec(single(nullable=True), "m").parse_oip(body, {}).inputs["x"]
    np.testing.assert_array_equal(found, np.array([[np.nan, 2, np.nan, 4]], np.float32))


def test_nan_in_binary_is_missing_in_a_nullable_input() -> None:
    array = np.array([[np.nan, 1, 2, 3]], np.float32)
    body, headers = encoded({"x": ("FP32", array)}, is_binary=True)
    found = Codec(single(nullable=True), "m").parse_oip(body, headers).inputs["x"]
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "data", [[1, 2, 3, 4, 5, 6, 7, 8], [[1, 2, 3, 4], [5, 6, 7, 8]]], ids=["flat", "nested"]
)
def test_json_data_may_be_flat_or_nested(data: list) -> None:
    body = orjson.dumps({"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": data}]})
    found = Codec(single(), "m").parse_oip(body, {}).inputs["x"]
    np.testing.assert_array_equal(found, np.arange(1, 9, dtype=np.float32).reshape(2, 4))


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("is_binary", [False, True])
def test_encoded_images(shape: tuple[int, ...], is_binary: bool) -> None:
    file = SOME_PNG if is_binary else base64.b64encode(SOME_PNG)
    body, headers = encoded(
        {"image": ("BYTES", np.array([file, file], object).reshape(shape))}, is_binary=is_binary
    )
    found = Codec(digits(), "m").parse_oip(body, headers).inputs["image"]
    np.testing.assert_array_equal(found, np.stack([SOME_PIXELS[..., None]] * 2))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 1)])
@pytest.mark.parametrize("is_binary", [False, True])
def test_raw_pixels(shape: tuple[int, ...], is_binary: bool) -> None:
    body, headers = encoded({"image": ("UINT8", SOME_PIXELS.reshape(shape))}, is_binary=is_binary)
    found = Codec(digits(), "m").parse_oip(body, headers).inputs["image"]
    np.testing.assert_array_equal(found, SOME_PIXELS.reshape(1, 8, 8, 1))


OUTPUTS = {"label": np.array(["7"], object), "probabilities": np.full((1, 10), 0.1, np.float32)}


def ask(outputs: list[triton.InferRequestedOutput] | None) -> tuple[InferRequest, triton.InferResult, bytes]:
    codec = Codec(digits(), "digits")
    pixels = {"image": ("UINT8", SOME_PIXELS[None])}
    body, headers = encoded(pixels, is_binary=True, outputs=outputs, request_id="id-1")
    request = codec.parse_oip(body, headers)
    answer, answer_headers = codec.render_oip(OUTPUTS, request=request, version="3")
    return request, decoded(answer, answer_headers), dict(answer_headers)[b"content-type"]


def test_tritonclient_asks_for_every_output_in_binary() -> None:
    request, result, content_type = ask(None)
    assert request.outputs == (OutputSpec("label", True), OutputSpec("probabilities", True))
    assert content_type == b"application/octet-stream"
    assert result.as_numpy("label").tolist() == [b"7"]
    np.testing.assert_array_equal(result.as_numpy("probabilities"), OUTPUTS["probabilities"])
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("id-1", "digits", "3")


def test_outputs_are_answered_in_the_order_and_form_asked_for() -> None:
    _, result, _ = ask(
        [
            triton.InferRequestedOutput("probabilities", binary_data=False),
            triton.InferRequestedOutput("label", binary_data=True),
        ]
    )
    first, second = result.get_response()["outputs"]
    assert (first["name"], first["data"]) == ("probabilities", [0.1] * 10)
    assert (second["name"], second["parameters"]) == ("label", {"binary_data_size": 5})
    _, result, content_type = ask([triton.InferRequestedOutput("label", binary_data=False)])
    assert content_type == b"application/json"
    assert [entry["name"] for entry in result.get_response()["outputs"]] == ["label"]


def test_an_outputs_own_wish_outranks_the_requests() -> None:
    document = {
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0, 0, 0, 0]}],
        "outputs": [{"name": "value", "parameters": {"binary_data": False}}],
        "parameters": {"binary_data_output": True, "priority": 3},
        "id": None,
    }
    request = Codec(single(), "m").parse_oip(orjson.dumps(document), {})
    assert request.outputs == (OutputSpec("value", False),)
    assert request.parameters["priority"] == 3
    del document["outputs"][0]["parameters"]
    assert Codec(single(), "m").parse_oip(orjson.dumps(document), {}).outputs == (OutputSpec("value", True),)


def test_nan_is_null_in_json_and_itself_in_binary() -> None:
    values = np.array([np.nan, 1.5], np.float32)
    codec = Codec(single(), "m")
    request = InferRequest(inputs={}, rows=2)
    body, _ = codec.render_oip({"value": values}, request=request, version="1")
    assert orjson.loads(body)["outputs"][0]["data"] == [None, 1.5]
    request = InferRequest(inputs={}, rows=2, outputs=(OutputSpec("value", True),))
    body, headers = codec.render_oip({"value": values}, request=request, version="1")
    np.testing.assert_array_equal(decoded(body, headers).as_numpy("value"), values)


def test_metadata_is_as_the_protocol_has_it() -> None:
    server = orjson.loads(server_metadata())
    assert server["name"] == "tandem"
    assert server["extensions"] == ["binary_tensor_data"]
    model = orjson.loads(Codec(digits(), "digits").metadata(["2", "3"], "onnxruntime_onnx"))
    assert (model["name"], model["versions"], model["platform"]) == ("digits", ["2", "3"], "onnxruntime_onnx")
    (image,) = model["inputs"]
    assert (image["name"], image["datatype"], image["shape"]) == ("image", "BYTES", [-1])
    assert image["parameters"]["also_takes"] == "UINT8 [-1, 8, 8, 1]"
    assert model["outputs"][1] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
    assert model["parameters"]["labels"] == list("0123456789")
    columns = orjson.loads(Codec(table(), "t").metadata(["1"], "p"))["inputs"]
    assert columns[0] == {"name": "age", "datatype": "FP32", "shape": [-1], "parameters": {"nullable": True}}
    assert columns[2] == {"name": "rooms", "datatype": "INT64", "shape": [-1]}
