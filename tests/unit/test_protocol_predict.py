"""Plain-JSON predict: what it takes, what it refuses, and what a person reads in its answer."""

import base64

import numpy as np
import orjson
import pytest
from protocol_models import CLASSES, SOME_PIXELS, SOME_PNG, digits, picture_file, refused, single, table

from cluster.signature import Signature, Tensor
from serving.protocol.codec import Codec
from serving.protocol.limits import Limits

LIMITS = Limits(max_body_bytes=1_000_000, max_rows=100, max_objects=100_000)


def instances(*rows: object, **more: object) -> bytes:
    return orjson.dumps({"instances": list(rows), **more})


def wide_table(columns: int) -> Signature:
    tensors = [Tensor(name=f"c{n}", dtype="FP32", shape=(-1,), nullable=True) for n in range(columns)]
    return Signature(task="t", inputs=tuple(tensors), outputs=table().outputs)


ROOM = {"rooms": 3, "owner": True}
BAD_PREDICTS: dict[str, tuple[Signature, bytes, int, str]] = {
    "not JSON": (table(), b"{", 400, "not JSON"),
    "a bare list": (table(), b"[1]", 400, "not an object"),
    "inputs instead": (table(), b'{"inputs": []}', 400, "unknown key"),
    "one more key": (table(), instances(ROOM, signature_name="a"), 400, "unknown key"),
    "instances are an object": (table(), b'{"instances": {}}', 400, "not a list"),
    "no instance": (table(), instances(), 422, "no rows"),
    "too many instances": (table(), instances(*[ROOM] * 101), 413, "too many instances"),
    "an instance is a list": (table(), instances(ROOM, [1]), 422, "instance 1 is not an object"),
    "an instance is null": (table(), instances(None), 422, "instance 0 is not an object"),
    "an unknown column": (table(), instances(ROOM, {**ROOM, "aeg": 3}), 422, "instance 1 has an input"),
    "a missing column": (table(), instances(ROOM, {"rooms": 3}), 422, "instance 1 lacks input 'owner'"),
    "null where it may not be": (
        table(),
        instances({**ROOM, "rooms": None}),
        422,
        "a value it does not take",
    ),
    "a string for a number": (table(), instances({**ROOM, "age": "old"}), 422, "a value it does not take"),
    "a number for a string": (table(), instances({**ROOM, "city": 7}), 422, "a value it does not take"),
    "a list for a number": (table(), instances({**ROOM, "age": [1]}), 422, "a value it does not take"),
    "a float for an integer": (table(), instances({**ROOM, "rooms": 3.5}), 422, "a value it does not take"),
    "a string for a tensor": (single(), instances("abcd"), 422, "not nested as its shape"),
    "a short row": (single(), instances([1, 2, 3]), 422, "not nested as its shape"),
    "rows that differ": (single(row_shape=(-1,)), instances([1, 2], [1]), 422, "not nested as its shape"),
    "an empty row": (single(row_shape=(-1,)), instances([]), 422, "not nested as its shape"),
    "an object without the name": (single(), instances({"y": [1, 2, 3, 4]}), 422, "instance 0 has an input"),
    "an empty object": (single(), instances({}), 422, "instance 0 lacks input 'x'"),
    "an image that is a number": (digits(), instances(7), 422, "not base64"),
    "an image that is null": (digits(), instances(None), 422, "not base64"),
    "an image and pixels": (digits(), instances([[0] * 8] * 8, {"b64": ""}), 422, "not nested as its shape"),
    "pixels over 255": (digits(), instances([[0] * 7 + [256]] * 8), 422, "a value it does not take"),
    "nulls that would fill memory": (
        single(row_shape=(300, 300), nullable=True),
        instances(None, None),
        413,
        "too many elements",
    ),
    "empty rows that would fill memory": (
        wide_table(columns=1001),
        instances(*[{}] * 100),
        413,
        "too many values",
    ),
    "base64 with a line break": (digits(), instances({"b64": "aGVs\nbG8="}), 422, "not base64"),
    "base64 in Arabic": (digits(), instances({"b64": "ا"}), 422, "not base64"),
}


@pytest.mark.parametrize("case", BAD_PREDICTS)
def test_bad_predict_requests(case: str) -> None:
    signature, body, status, message = BAD_PREDICTS[case]
    error = refused(Codec(signature, "m", LIMITS).parse_predict, body, "application/json")
    assert (error.http_status, message in error.failed) == (status, True), error


@pytest.mark.parametrize(
    "content_type", ["image/gif", "multipart/form-data; boundary=x", "text/html", "nonsense"]
)
def test_a_content_type_that_is_not_taken_is_415(content_type: str) -> None:
    assert refused(Codec(digits(), "m").parse_predict, SOME_PNG, content_type).http_status == 415


@pytest.mark.parametrize("signature", [single(), table()])
def test_an_image_for_a_model_without_images_is_422(signature: Signature) -> None:
    error = refused(Codec(signature, "m").parse_predict, SOME_PNG, "image/png")
    assert (error.http_status, "does not take an image" in error.failed) == (422, True)


def test_names_that_are_nearly_right_are_suggested() -> None:
    codec = Codec(table(), "m")
    assert "'age'" in refused(codec.parse_predict, instances({**ROOM, "aeg": 1}), "").fix


def test_many_images_share_the_pixels_of_one_request() -> None:
    codec = Codec(digits(), "m", Limits(max_image_pixels=1000))
    image = base64.b64encode(picture_file(np.zeros((20, 20), np.uint8))).decode()
    assert codec.parse_predict(instances(image, image), "").rows == 2
    error = refused(codec.parse_predict, instances(image, image, image), "")
    assert (error.http_status, error.allowed) == (413, "at most 333 pixels")


def test_a_long_value_is_cut_in_the_message() -> None:
    error = refused(Codec(single("INT64"), "m").parse_predict, instances(["a" * 100_000] * 4), "")
    assert len(str(error)) < 400


def test_table_rows_become_one_array_a_column() -> None:
    body = instances(ROOM, {"rooms": -4, "owner": False, "age": 3.5, "city": "Köln"}, {**ROOM, "age": None})
    request = Codec(table(), "m").parse_predict(body, "application/json; charset=utf-8")
    assert (request.rows, request.request_id, request.outputs) == (3, None, ())
    np.testing.assert_array_equal(request.inputs["age"], np.array([np.nan, 3.5, np.nan], np.float32))
    assert request.inputs["city"].tolist() == ["", "Köln", ""]
    assert request.inputs["rooms"].tolist() == [3, -4, 3]
    assert request.inputs["owner"].tolist() == [[True], [False], [True]]
    assert [array.dtype for array in request.inputs.values()] == [np.float32, object, np.int64, np.bool_]


@pytest.mark.parametrize("row", [[1, 2, 3, 4.5], {"x": [1, 2, 3, 4.5]}])
def test_a_single_input_may_be_bare_or_named(row: object) -> None:
    request = Codec(single(), "m").parse_predict(instances(row, row), "")
    np.testing.assert_array_equal(request.inputs["x"], np.array([[1, 2, 3, 4.5]] * 2, np.float32))


def test_sizes_that_the_model_leaves_open_are_the_requests() -> None:
    request = Codec(single(row_shape=(-1, 2)), "m").parse_predict(instances([[1, 2], [3, 4], [5, 6]]), "")
    assert request.inputs["x"].shape == (1, 3, 2)


def test_a_missing_tensor_is_nan_all_over() -> None:
    request = Codec(single(nullable=True), "m").parse_predict(instances({}, {"x": [1, None, 3, 4]}), "")
    np.testing.assert_array_equal(request.inputs["x"][:, 1:], [[np.nan] * 3, [np.nan, 3, 4]])


@pytest.mark.parametrize(
    "row",
    [
        {"b64": base64.b64encode(SOME_PNG).decode()},
        base64.b64encode(SOME_PNG).decode(),
        {"image": base64.b64encode(SOME_PNG).decode()},
        {"image": {"b64": base64.b64encode(SOME_PNG).decode()}},
        SOME_PIXELS.tolist(),
        SOME_PIXELS[..., None].tolist(),
        {"image": SOME_PIXELS.tolist()},
    ],
    ids=range(7),
)
def test_an_image_in_each_of_its_forms_is_the_same_pixels(row: object) -> None:
    request = Codec(digits(), "m").parse_predict(instances(row, row), "application/json")
    assert request.inputs["image"].dtype == np.uint8
    np.testing.assert_array_equal(request.inputs["image"], np.stack([SOME_PIXELS[..., None]] * 2))


@pytest.mark.parametrize(
    "content_type",
    [
        "image/png",
        "image/jpeg",
        "IMAGE/PNG; q=1",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "",
    ],
)
def test_an_image_file_as_the_body(content_type: str) -> None:
    request = Codec(digits(), "m").parse_predict(SOME_PNG, content_type)
    np.testing.assert_array_equal(request.inputs["image"], SOME_PIXELS[None, ..., None])
    jpeg = picture_file(SOME_PIXELS, "JPEG")
    assert Codec(digits(3), "m").parse_predict(jpeg, content_type).inputs["image"].shape == (1, 8, 8, 3)


def test_an_image_beside_inputs_that_may_be_missing() -> None:
    image, columns = digits().inputs, table().inputs
    both = Signature(task="t", inputs=(*image, columns[0]), outputs=table().outputs)
    request = Codec(both, "m").parse_predict(SOME_PNG, "image/png")
    assert request.inputs["image"].shape == (1, 8, 8, 1)
    assert np.isnan(request.inputs["age"]).tolist() == [True]
    needed = Signature(task="t", inputs=(*image, columns[2]), outputs=table().outputs)
    assert refused(Codec(needed, "m").parse_predict, SOME_PNG, "image/png").http_status == 422


def test_a_classifiers_answer_names_its_classes() -> None:
    probabilities = np.full((1, 10), 0.1, np.float32)
    answer = Codec(digits(), "digits").render_predict(
        {"label": np.array(["7"], object), "probabilities": probabilities}, version="3"
    )
    assert answer == (
        b'{"model":"digits","version":"3","predictions":[{"label":"7","probabilities":{'
        + b",".join(b'"%d":0.1' % n for n in range(10))
        + b"}}]}"
    )


def test_a_regressors_answer_is_its_value_and_nan_is_null() -> None:
    values = np.array([1.5, np.nan, np.inf], np.float32)
    for array in (values, values[:, None]):
        answer = orjson.loads(Codec(single(), "m").render_predict({"value": array}, version="1"))
        assert answer["predictions"] == [{"value": 1.5}, {"value": None}, {"value": None}]


def test_any_output_can_be_written() -> None:
    outputs = (
        Tensor(name="mask", dtype="BOOL", shape=(-1, 2)),
        Tensor(name="count", dtype="INT64", shape=(-1,)),
        Tensor(name="half", dtype="FP16", shape=(-1, 1, 2)),
        Tensor(name="words", dtype="BYTES", shape=(-1, 2)),
    )
    signature = Signature(task="t", inputs=single().inputs, outputs=outputs, labels=CLASSES)
    arrays = {
        "mask": np.array([[True, False], [False, True]]).T,
        "count": np.array([2**62, -1]),
        "half": np.array([[[0.5, 1]], [[2, np.nan]]], np.float16),
        "words": np.array([["a", b"b"], ["ü", ""]], object),
    }
    answer = orjson.loads(Codec(signature, "m").render_predict(arrays, version="1"))
    assert answer["predictions"] == [
        {"mask": [True, False], "count": 2**62, "half": [[0.5, 1.0]], "words": ["a", "b"]},
        {"mask": [False, True], "count": -1, "half": [[2.0, None]], "words": ["ü", ""]},
    ]


def test_class_names_that_repeat_stay_a_list() -> None:
    outputs = (Tensor(name="probabilities", dtype="FP32", shape=(-1, 2)),)
    signature = Signature(task="t", inputs=single().inputs, outputs=outputs, labels=("a", "a"))
    answer = Codec(signature, "m").render_predict({"probabilities": np.array([[0.25, 0.75]])}, version="1")
    assert orjson.loads(answer)["predictions"] == [{"probabilities": [0.25, 0.75]}]
