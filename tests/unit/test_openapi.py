"""The OpenAPI document is valid, has every route, and its schemas agree with the codec."""

import itertools

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from protocol_models import digits, single, table
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from cluster.errors import Unprocessable
from cluster.signature import DataType, Signature
from serving.protocol import schemas
from serving.protocol.codec import Codec
from serving.protocol.limits import Limits
from serving.protocol.openapi import openapi

MODELS = [("digits", digits()), ("colour", digits(3)), ("house.price-2", table()), ("wide", single())]
LIMITS = Limits()


def document() -> dict:
    return orjson.loads(orjson.dumps(openapi(MODELS)))


def test_it_is_openapi_3_1() -> None:
    assert [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(document())] == []


def test_every_route_of_every_model_is_there() -> None:
    routes = {(method, path) for path, item in document()["paths"].items() for method in item} - {
        ("parameters", path) for path in document()["paths"]
    }
    expected = {
        ("get", path) for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/metrics", "/openapi.json")
    }
    for name, _ in MODELS:
        for base in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{{version}}"):
            expected |= {("get", base), ("get", f"{base}/ready"), ("post", f"{base}/infer")}
        expected.add(("post", f"/v1/models/{name}:predict"))
        expected.add(("post", f"/v1/models/{name}:feedback"))
    assert routes == expected


def test_every_error_status_is_documented_on_the_routes_that_run_models() -> None:
    wanted = {"400", "401", "404", "405", "408", "413", "415", "422", "429", "500", "503", "504"}
    for path, item in document()["paths"].items():
        if "post" in item:
            answered = {"202"} if path.endswith(":feedback") else {"200"}
            assert set(item["post"]["responses"]) == wanted | answered, path


def test_operation_ids_are_unique_and_references_lead_somewhere() -> None:
    found = document()
    ids = [
        item[method]["operationId"]
        for item in found["paths"].values()
        for method in item.keys() & {"get", "post"}
    ]
    assert len(ids) == len(set(ids))
    for reference in references(found):
        target = found
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + list(itertools.chain.from_iterable(map(references, node.values())))
    return list(itertools.chain.from_iterable(map(references, node))) if isinstance(node, list) else []


@pytest.mark.parametrize("name", [name for name, _ in MODELS])
@pytest.mark.parametrize("part", ["InferRequest", "InferResponse", "PredictRequest", "PredictResponse"])
def test_each_schema_is_itself_valid(name: str, part: str) -> None:
    Draft202012Validator.check_schema(document()["components"]["schemas"][f"{name}.{part}"])


def test_a_service_without_models_yet_has_the_servers_routes() -> None:
    assert "/v2" in openapi([])["paths"]


@pytest.mark.parametrize(
    ("signature", "body", "is_valid"),
    [
        (table(), {"instances": [{"rooms": 3, "owner": True}]}, True),
        (table(), {"instances": [{"rooms": 3, "owner": True, "age": None, "city": "Bonn"}]}, True),
        (table(), {"instances": [{"rooms": 3.5, "owner": True}]}, False),
        (table(), {"instances": [{"rooms": 3}]}, False),
        (table(), {"instances": [{"rooms": 3, "owner": True, "size": 1}]}, False),
        (table(), {"instances": []}, False),
        (single(), {"instances": [[1, 2, 3, 4.5]]}, True),
        (single(), {"instances": [{"x": [1, 2, 3, 4.5]}]}, True),
        (single(), {"instances": [[1, 2, 3]]}, False),
        (single(), {"instances": [[1, 2, 3, 1e300]]}, False),
        (digits(), {"instances": [[[0] * 8] * 8]}, True),
        (digits(), {"instances": [[[256] * 8] * 8]}, False),
    ],
)
def test_the_predict_schema_says_what_the_codec_does(
    signature: Signature, body: dict, is_valid: bool
) -> None:
    validator = Draft202012Validator(schemas.predict_request(signature, LIMITS))
    assert validator.is_valid(body) is is_valid
    codec = Codec(signature, "m", LIMITS)
    if is_valid:
        assert codec.parse_predict(orjson.dumps(body), "application/json").rows == 1
    else:
        with pytest.raises(Unprocessable):
            codec.parse_predict(orjson.dumps(body), "application/json")


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"rooms": st.integers(-(2**63), 2**63 - 1), "owner": st.booleans()},
            optional={
                "age": st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
                "city": st.none()
                | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            },
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_what_the_table_schema_takes_the_codec_takes(rows: list[dict]) -> None:
    body = {"instances": rows}
    assert Draft202012Validator(schemas.predict_request(table(), LIMITS)).is_valid(body)
    request = Codec(table(), "m").parse_predict(orjson.dumps(body), "application/json")
    assert request.rows == len(rows)


@pytest.mark.parametrize("dtype", ["BOOL", "UINT8", "INT64", "FP16", "FP32", "FP64", "BYTES"])
def test_every_data_type_has_a_schema(dtype: DataType) -> None:
    Draft202012Validator.check_schema(schemas.element(dtype))


def test_the_infer_schema_says_what_the_codec_does() -> None:
    validator = Draft202012Validator(schemas.infer_request(table(), LIMITS))
    good = {
        "id": "7",
        "inputs": [
            {"name": "age", "shape": [2], "datatype": "FP32", "data": [1.5, None]},
            {"name": "city", "shape": [2, 1], "datatype": "BYTES", "data": ["a", "b"]},
            {"name": "rooms", "shape": [2], "datatype": "INT64", "data": [1, 2]},
            {"name": "owner", "shape": [2, 1], "datatype": "BOOL", "data": [[True], [False]]},
        ],
        "outputs": [{"name": "value", "parameters": {"binary_data": False}}],
    }
    assert [error.message for error in validator.iter_errors(good)] == []
    assert Codec(table(), "m").parse_oip(orjson.dumps(good), {}).rows == 2
    assert not validator.is_valid({**good, "inputs": good["inputs"][1:]})
    assert not validator.is_valid({**good, "more": 1})


@pytest.mark.parametrize(("name", "signature"), MODELS)
def test_the_examples_are_good_requests(name: str, signature: Signature) -> None:
    codec, paths = Codec(signature, name, LIMITS), document()["paths"]
    for path, schema, parse in (
        (
            f"/v1/models/{name}:predict",
            schemas.predict_request(signature, LIMITS),
            lambda body: codec.parse_predict(body, "application/json"),
        ),
        (
            f"/v2/models/{name}/infer",
            schemas.infer_request(signature, LIMITS),
            lambda body: codec.parse_oip(body, {}),
        ),
    ):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert [error.message for error in Draft202012Validator(schema).iter_errors(example)] == []
        assert parse(orjson.dumps(example)).rows == 1


def test_a_model_with_large_inputs_has_no_example() -> None:
    paths = openapi([("large", single(row_shape=(2000,)))])["paths"]
    assert (
        "example"
        not in paths["/v1/models/large:predict"]["post"]["requestBody"]["content"]["application/json"]
    )
