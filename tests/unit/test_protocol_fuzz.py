"""Whatever bytes come, the codec answers with a request or with a 400, 413, 415 or 422, never otherwise.

Bodies that are right are made wrong: bytes are flipped, cut, repeated and spliced, and JSON nodes are
replaced by things that break parsers. Seeded, so a failure names the seed that repeats it.
"""

import base64
import copy
import random
import struct
from collections.abc import Callable

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_models import SOME_PIXELS, SOME_PNG, digits, picture_file, single, table

from cluster.errors import TandemError
from cluster.signature import NUMPY_DTYPES, Signature
from serving.protocol.codec import Codec
from serving.protocol.limits import Limits
from serving.protocol.requests import InferRequest

LENGTH = b"inference-header-content-length"
LIMITS = Limits(max_body_bytes=100_000, max_rows=50, max_objects=5_000, max_tensor_elements=10_000)
SEEDS = range(8)
ROUNDS = 1000

TABLE_TENSORS = [
    {"name": "age", "shape": [2], "datatype": "FP32", "data": [1.5, None]},
    {"name": "city", "shape": [2, 1], "datatype": "BYTES", "data": ["Köln", ""]},
    {"name": "rooms", "shape": [2], "datatype": "INT64", "data": [1, 2]},
    {"name": "owner", "shape": [2, 1], "datatype": "BOOL", "data": [[True], [False]]},
]
PNG_TEXT = base64.b64encode(SOME_PNG).decode()
OUTPUTS = [{"name": "value", "parameters": {"binary_data": True}}]
DOCUMENTS: list[tuple[Signature, dict]] = [
    (table(), {"id": "a", "inputs": TABLE_TENSORS, "outputs": OUTPUTS, "parameters": {"priority": 1}}),
    (table(), {"instances": [{"rooms": 3, "owner": True, "age": 2.5, "city": "Bonn"}] * 2}),
    (single(), {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP64", "data": [[1, 2, 3, 4]] * 2}]}),
    (single(row_shape=(-1, 2), nullable=True), {"instances": [[[1, 2], [3, None]], {"x": [[1, 2], [3, 4]]}]}),
    (digits(), {"instances": [{"b64": PNG_TEXT}, {"image": {"b64": PNG_TEXT}}]}),
    (digits(), {"instances": SOME_PIXELS[None].tolist()}),
    (
        digits(),
        {"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": [PNG_TEXT] * 2}]},
    ),
]

STRANGE: list[object] = [
    *(None, True, False, 0, -1, 1, 2, 50, 51, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.5, -0.0, 1e-320, 1e38, 1e39, 1e308, "", "x", "\0", "NaN", "1", "é" * 50, "a" * 500, "{}"),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": None},
        {"b64": ""},
        [[1], [2, 3]],
        [None],
        [[[[[[1]]]]]],
        "age",
        "value",
        "image",
    ),
    *("FP16", "FP32", "INT64", "BYTES", "BOOL", "UINT8", "FP8", {"binary_data_size": 4}, {"binary_data": 1}),
]


def assert_answered(parse: Callable[[], InferRequest], signature: Signature) -> bool:
    """Whether `parse` took it; if so the arrays are as promised, and if not the refusal is in order."""
    try:
        request = parse()
    except TandemError as error:
        refusal = error
    else:
        assert_sound(request, signature)
        return True
    assert refusal.http_status in (400, 413, 415, 422), refusal
    assert set(refusal.parts()) == {"failed", "got", "allowed", "fix"}, refusal
    return False


def assert_sound(request: InferRequest, signature: Signature) -> None:
    """The arrays are what the codec promises."""
    assert set(request.inputs) == {tensor.name for tensor in signature.inputs}
    assert 1 <= request.rows <= LIMITS.max_rows
    for tensor in signature.inputs:
        array = request.inputs[tensor.name]
        assert array.dtype == NUMPY_DTYPES[tensor.dtype]
        assert array.shape[0] == request.rows
        assert len(array.shape) == len(tensor.shape)
        assert all(wanted in (-1, got) for wanted, got in zip(tensor.shape, array.shape, strict=True))
        if tensor.dtype.startswith("FP"):
            assert not np.isinf(array).any()
            assert tensor.nullable or not np.isnan(array).any()
        if tensor.dtype == "BYTES":
            assert all(type(text) is str and "\0" not in text for text in array.flat)


def parse_any(codec: Codec, body: bytes, headers: dict[bytes, bytes]) -> list[bool]:
    """Both protocols must stand any body."""
    types = ("application/json", "", "image/png", "application/octet-stream")
    answers = [assert_answered(lambda: codec.parse_oip(body, headers), codec.signature)]
    for content_type in types:
        answers.append(
            assert_answered(lambda kind=content_type: codec.parse_predict(body, kind), codec.signature)
        )
    return answers


def paths(node: object, here: tuple = ()) -> list[tuple]:
    found = [here]
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        found += paths(child, (*here, key))
    return found


def changed(document: dict, dice: random.Random) -> object:
    """The document with one node replaced, taken out, repeated or renamed."""
    result = copy.deepcopy(document)
    nodes = paths(result)[1:]
    if not nodes:
        return result
    path = dice.choice(nodes)
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    action = dice.random()
    if action < 0.7:
        parent[path[-1]] = copy.deepcopy(dice.choice(STRANGE))
    elif action < 0.8:
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.extend(copy.deepcopy([parent[path[-1]]] * dice.choice((1, 2, 60))))
    else:
        parent[dice.choice(["", "x", "shape", "data", "é\n"])] = parent.pop(path[-1])
    return result


def damaged(body: bytes, dice: random.Random) -> bytes:
    """The body with a few bytes flipped, cut, repeated or spliced."""
    data = bytearray(body)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at, until = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        match dice.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at:until]
            case 2:
                data[at:at] = data[at:until]
            case 3:
                data[at:at] = dice.choice(
                    (b"[", b"]" * 40, b"{", b'"', b"\0", b"\xff", b"NaN", b"9" * 400, b",")
                )
            case 4 if at < len(data):
                data[at] = dice.randrange(256)
            case _:
                data[at:until] = dice.randbytes(dice.randrange(9))
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_json_with_strange_nodes(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(ROUNDS):
        signature, document = dice.choice(DOCUMENTS)
        for _ in range(dice.choice((1, 1, 2))):
            document = changed(document, dice)
        parse_any(Codec(signature, "m", LIMITS), orjson.dumps(document), {})


@pytest.mark.parametrize("seed", SEEDS)
def test_json_with_damaged_bytes(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(ROUNDS):
        signature, document = dice.choice(DOCUMENTS)
        parse_any(Codec(signature, "m", LIMITS), damaged(orjson.dumps(document), dice), {})


def binary_body() -> tuple[bytes, int]:
    """A good body with four binary tensors."""
    texts = b"".join(struct.pack("<I", len(text)) + text for text in ("Köln".encode(), b""))
    raws = [np.array([1.5, np.nan], "<f4").tobytes(), texts, np.array([1, 2], "<i8").tobytes(), b"\1\0"]
    tensors = [
        {key: value for key, value in tensor.items() if key != "data"}
        | {"parameters": {"binary_data_size": len(raw)}}
        for tensor, raw in zip(TABLE_TENSORS, raws, strict=True)
    ]
    text = orjson.dumps({"inputs": tensors})
    return b"".join([text, *raws]), len(text)


@pytest.mark.parametrize("seed", SEEDS)
def test_binary_tensors_with_damaged_bytes_and_lengths(seed: int) -> None:
    dice = random.Random(seed)
    codec = Codec(table(), "m", LIMITS)
    good, length = binary_body()
    assert codec.parse_oip(good, {LENGTH: str(length).encode()}).rows == 2
    taken = 0
    for _ in range(ROUNDS):
        tail_only = dice.random() < 0.5
        body = good[:length] + damaged(good[length:], dice) if tail_only else damaged(good, dice)
        text = str(length + dice.choice((0, 0, 0, 1, -1, len(good), -length))).encode()
        headers = {LENGTH: text if dice.random() < 0.8 else damaged(text, dice)}
        taken += parse_any(codec, body, headers)[0]
    assert 0 < taken < ROUNDS, "the damage is either nothing or everything, so this tests little"


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_image_files(seed: int, format: str) -> None:
    dice = random.Random(seed)
    codec = Codec(digits(), "m", LIMITS)
    file = picture_file(SOME_PIXELS, format)
    for _ in range(ROUNDS):
        body = damaged(file, dice)
        assert_answered(lambda body=body: codec.parse_predict(body, "image/png"), codec.signature)


@given(
    body=st.binary(max_size=200), header=st.none() | st.binary(max_size=12), content_type=st.text(max_size=20)
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_at_all(body: bytes, header: bytes | None, content_type: str) -> None:
    for signature in (table(), digits()):
        codec = Codec(signature, "m", LIMITS)
        assert_answered(lambda c=codec: c.parse_predict(body, content_type), signature)
        parse_any(codec, body, {} if header is None else {LENGTH: header})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=9), children, max_size=4)
    ),
    max_leaves=12,
)


@given(value=json_values, key=st.sampled_from(["inputs", "instances", "outputs", "parameters", "id"]))
@settings(max_examples=300, deadline=None)
def test_any_json_at_all(value: object, key: str) -> None:
    for signature, document in DOCUMENTS:
        parse_any(Codec(signature, "m", LIMITS), orjson.dumps({**document, key: value}), {})
