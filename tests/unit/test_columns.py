"""Columns to arrays: missing values, categories, images, labels, and what is refused by row."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from cluster import images
from cluster.errors import BadInput
from cluster.signature import ImageEncoding, Signature, Tensor
from training.data.columns import input_arrays, model_arrays, target_array
from training.data.words import encode_words
from training.facts import ColumnFacts, DatasetFacts
from training.task import TARGET


def signature(*tensors: Tensor) -> Signature:
    return Signature(task="t", inputs=tensors, outputs=(Tensor(name="y", dtype="FP32", shape=(-1,)),))


def one(values: object, dtype: str = "FP32", shape: tuple = (-1,), nullable: bool = True) -> np.ndarray:
    tensor = Tensor(name="x", dtype=dtype, shape=shape, nullable=nullable and dtype in ("FP32", "BYTES"))
    column = values if isinstance(values, pa.Array) else pa.array(values)
    return input_arrays(pa.table({"x": column}), signature(tensor))["x"]


def facts(labels: tuple[str, ...] | None) -> DatasetFacts:
    kind = "number" if labels is None else "category"
    return DatasetFacts(
        fingerprint="f", rows=1, columns={"y": ColumnFacts(kind=kind, categories=labels)}, label="y"
    )


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_numbers_become_float32_with_nan_for_missing() -> None:
    array = one(pa.chunked_array([[1, None], [3]]).combine_chunks())
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [1, np.nan, 3])
    np.testing.assert_array_equal(one([True, False, None]), [1, 0, np.nan])
    np.testing.assert_array_equal(one(pa.array([2**63], pa.uint64())), np.float32([2**63]))
    np.testing.assert_array_equal(one(pa.array([1.5], pa.float16())), [1.5])
    assert one([1.0, 2.0], shape=(-1, 1)).shape == (2, 1)


def test_strings_keep_their_words_and_missing_ones_are_empty() -> None:
    array = one(["a", None, ""], "BYTES")
    assert array.dtype == object
    assert array.tolist() == ["a", "", ""]
    assert one(pa.array(["u", "v", None]).dictionary_encode(), "BYTES").tolist() == ["u", "v", ""]
    assert one([True, None], "BYTES").tolist() == ["true", ""]
    assert one([12, -3], "BYTES").tolist() == ["12", "-3"]


def test_integers_must_fit_exactly() -> None:
    assert one([1, 2], "UINT8").dtype == np.uint8
    for values in ([1, 256], [0, -1], [0.5, 1.0]):
        with pytest.raises(BadInput, match="can't hold"):
            one(values, "UINT8")


@pytest.mark.parametrize(
    ("values", "dtype", "match"),
    [
        ([1.0, float("inf")], "FP32", "row 1 has a value .* can't hold"),
        ([0.0, 1e300], "FP32", "row 1 has a value .* can't hold"),
        (["1", "2"], "FP32", "doesn't hold numbers"),
        ([b"1", b"2"], "FP32", "holds bytes"),
        ([b"1", b"2"], "BYTES", "holds bytes"),
        ([1, None], "INT64", "row 1 has no value"),
    ],
)
def test_refusals_name_the_row(values: list, dtype: str, match: str) -> None:
    with pytest.raises(BadInput, match=match) as error:
        one(values, dtype)
    assert set(error.value.parts()) == {"failed", "got", "allowed", "fix"}


@pytest.mark.parametrize("values", [[1.0, None], [1.0, float("nan")], ["a", ""], ["a", None]])
def test_missing_values_need_a_nullable_input(values: list) -> None:
    dtype = "BYTES" if isinstance(values[0], str) else "FP32"
    one(values, dtype)
    with pytest.raises(BadInput, match="row 1 has no value"):
        one(values, dtype, nullable=False)


def test_a_missing_column_lists_those_there_are() -> None:
    with pytest.raises(BadInput, match="no column 'x'") as error:
        input_arrays(pa.table({"a": [1]}), signature(Tensor(name="x", dtype="FP32", shape=(-1,))))
    assert "columns a" in error.value.got


@pytest.mark.parametrize("threads", [0, 3])
def test_images_are_what_the_one_decoder_gives(threads: int) -> None:
    rng = np.random.default_rng(0)
    # Noise of this size makes files above the size from which threads are used.
    files = [png(rng.integers(0, 255, (100, 90), dtype=np.uint8)) for _ in range(70)]
    encoding = ImageEncoding(height=6, width=5, channels=1)
    tensor = Tensor(name="image", dtype="UINT8", shape=(-1, 6, 5, 1), encoding=encoding)
    table = pa.table({"image": pa.array(files, pa.large_binary())})
    with ThreadPoolExecutor(threads or 1) as pool:
        array = input_arrays(table, signature(tensor), pool=pool if threads else None)["image"]
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, np.stack([images.decode(file, encoding) for file in files]))


@pytest.mark.parametrize("bad", [None, b"", b"not an image"])
def test_an_image_that_cannot_be_decoded_is_named(bad: bytes | None) -> None:
    encoding = ImageEncoding(height=1, width=1, channels=1)
    tensor = Tensor(name="image", dtype="UINT8", shape=(-1, 1, 1, 1), encoding=encoding)
    table = pa.table({"image": pa.array([png(np.zeros((1, 1), np.uint8)), bad], pa.binary())})
    with pytest.raises(BadInput, match="row 77 of 'image'"):
        input_arrays(table, signature(tensor), row_ids=np.array([5, 77]))
    with pytest.raises(BadInput, match="doesn't hold images"):
        input_arrays(pa.table({"image": ["x"]}), signature(tensor))


def test_labels_become_class_indices() -> None:
    targets = target_array(pa.table({"y": ["dog", "cat", "dog"]}), facts(("cat", "dog")))
    assert targets.dtype == np.int64
    assert targets.tolist() == [1, 0, 1]
    assert target_array(pa.table({"y": [10, 2]}), facts(("2", "10"))).tolist() == [1, 0]
    assert target_array(pa.table({"y": [True]}), facts(("false", "true"))).tolist() == [1]


@pytest.mark.parametrize("values", [["cat", "cow"], ["cat", None], ["cat", ""]])
def test_an_unknown_label_names_row_and_value(values: list) -> None:
    with pytest.raises(BadInput, match="row 9 has a label") as error:
        target_array(pa.table({"y": values}), facts(("cat", "dog")), row_ids=np.array([3, 9]))
    assert error.value.got == repr(values[1])


def test_a_regression_has_float_targets_and_none_missing() -> None:
    targets = target_array(pa.table({"y": [1, 2]}), facts(None))
    assert targets.dtype == np.float32
    for bad in (None, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="row 1 has"):
            target_array(pa.table({"y": [1.0, bad]}), facts(None))


def test_words_are_counted_from_one_and_zero_is_missing_or_unseen() -> None:
    words = np.array(["b", "", None, "zebra", "a"], dtype=object)
    assert encode_words(words, ("a", "b")).tolist() == [2, 0, 0, 0, 1]
    assert encode_words(words.reshape(5, 1), ("a", "b")).shape == (5, 1)
    assert encode_words(words, ("", "b")).tolist() == [2, 0, 0, 0, 0]
    assert encode_words(np.array([], dtype=object), ("a",)).dtype == np.int64


def test_the_model_gets_encoded_words_and_the_target() -> None:
    word = Tensor(name="w", dtype="BYTES", shape=(-1,), nullable=True)
    number = Tensor(name="x", dtype="FP32", shape=(-1,))
    table = pa.table({"w": ["b", None, "q"], "x": [1, 2, 3], "y": ["n", "n", "m"], "unused": [0, 0, 0]})
    arrays = model_arrays(table, signature(word, number), {"w": ("a", "b")}, facts(("m", "n")))
    assert arrays["w"].tolist() == [2, 0, 0]
    assert arrays["w"].dtype == np.int64
    raw = input_arrays(table, signature(word))["w"]
    assert encode_words(raw, ("a", "b")).tolist() == arrays["w"].tolist()
    assert list(arrays) == ["w", "x", TARGET]
    assert arrays[TARGET].tolist() == [1, 1, 0]
    strict = Tensor(name="w", dtype="BYTES", shape=(-1,))
    with pytest.raises(BadInput, match="row 1 has no value for 'w'"):
        model_arrays(table, signature(strict), {"w": ("a", "b")}, facts(("m", "n")))


INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def whole_numbers(dtype: str) -> st.SearchStrategy[tuple[str, list[int]]]:
    limits = np.iinfo(dtype)
    any_of_them = st.integers(int(limits.min), int(limits.max)) | st.integers(0, 100)
    return st.lists(any_of_them, min_size=1, max_size=20).map(lambda values: (dtype, values))


@given(st.sampled_from(INTEGERS).flatmap(whole_numbers))
@example(("int8", [-100, 45, 100]))
def test_whole_number_labels_of_any_width_get_their_own_class(labelled: tuple[str, list[int]]) -> None:
    """Also where the difference of two labels is more than their type holds."""
    dtype, values = labelled
    labels = tuple(str(value) for value in sorted(set(values)))
    found = target_array(pa.table({"y": pa.array(values, pa.from_numpy_dtype(dtype))}), facts(labels))
    assert [labels[place] for place in found] == [str(value) for value in values]
