"""The strict header check: hostile headers are refused, quickly, for their reason."""

import json
import math
import struct
import sys

import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.format import safetensors as safetensors_header
from kvstore.format.documents import MAX_NESTING, strict_json
from kvstore.format.safetensors import (
    ITEM_SIZES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    parse_header,
)

META = '"__metadata__":{"kvstore":"{}"}'


def tensor(dtype="U8", shape=(4,), offsets=(0, 4)):
    """Return a tensor's description."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def spell(tensors):
    """Return a header as text."""
    return json.dumps(tensors, separators=(",", ":"))


def one(**changes):
    """Return a header of one tensor with fields changed; `None` takes one away."""
    fields = {**tensor(), **changes}
    return spell({"a": {k: v for k, v in fields.items() if v is not None}})


def raw_one(**changes):
    """Return a header of one tensor with fields given as JSON text."""
    fields = {"dtype": '"U8"', "shape": "[4]", "data_offsets": "[0,4]", **changes}
    inner = ",".join(f'"{key}":{value}' for key, value in fields.items())
    return f'{{"a":{{{inner}}}}}'


def many(count, shape=(0,)):
    """Return a header of many empty tensors."""
    text = spell(tensor(shape=shape, offsets=(0, 0)))
    return "{" + ",".join(f'"{i}":{text}' for i in range(count)) + "}"


# Why it is hostile, the header, bytes of data behind it, what the refusal says.
HOSTILE = [
    ("empty", "", 4, "Expecting value"),
    ("no object", "[]", 4, "not an object"),
    ("null", "null", 4, "not an object"),
    ("a number", "7", 4, "not an object"),
    ("text", '"a"', 4, "not an object"),
    ("cut off", one()[:-1], 4, "delimiter"),
    ("two values", one() + one(), 4, "Extra data"),
    ("no UTF-8", b'{"\xff":1}', 4, "decode"),
    ("UTF-16", one().encode("utf-16"), 4, "decode"),
    ("byte order mark", "\ufeff" + one(), 4, "Expecting value|BOM"),
    ("trailing bytes", one(), 5, "end at byte 4"),
    ("missing bytes", one(), 3, "end at byte 4"),
    ("data and no tensor", "{}", 1, "end at byte 0"),
    ("hole at the start", one(data_offsets=[1, 5]), 5, "hole"),
    (
        "hole between",
        spell({"a": tensor(), "b": tensor(offsets=(5, 9))}),
        9,
        "hole",
    ),
    ("overlap", spell({"a": tensor(), "b": tensor(offsets=(2, 6))}), 6, "overlap"),
    ("the same bytes twice", spell({"a": tensor(), "b": tensor()}), 4, "overlap"),
    ("duplicate tensor", '{"a":1,"a":2}', 4, "duplicate key"),
    ("duplicate field", '{"a":{"dtype":"U8","dtype":"U8"}}', 4, "duplicate key"),
    ("duplicate metadata", "{" + META + "," + META + "}", 0, "duplicate key"),
    ("duplicate by escape", '{"a":1,"\\u0061":2}', 4, "duplicate key"),
    ("a size of 4.0", raw_one(shape="[4.0]"), 4, "number not allowed"),
    ("a size of 4e0", raw_one(shape="[4e0]"), 4, "number not allowed"),
    ("an offset of 0.0", raw_one(data_offsets="[0.0,4]"), 4, "number not allowed"),
    ("NaN", raw_one(shape="[NaN]"), 4, "number not allowed"),
    ("infinity", raw_one(shape="[Infinity]"), 4, "number not allowed"),
    ("minus infinity", raw_one(shape="[-Infinity]"), 4, "number not allowed"),
    ("a float in an unknown field", raw_one(x="1.5"), 4, "number not allowed"),
    ("a negative size", one(shape=[-4]), 4, "bad shape"),
    ("two negative sizes", one(shape=[-2, -2]), 4, "bad shape"),
    ("a size of true", one(shape=[True], data_offsets=[0, 1]), 1, "bad shape"),
    ("a size of text", one(shape=["4"]), 4, "bad shape"),
    ("a size of null", one(shape=[None]), 4, "bad shape"),
    ("a size that is a list", one(shape=[[4]]), 4, "bad shape"),
    ("a shape that is a number", one(shape=4), 4, "bad shape"),
    ("a shape that is text", one(shape="4"), 4, "bad shape"),
    ("a shape that is an object", one(shape={"4": 4}), 4, "bad shape"),
    ("a size of 2^63", one(shape=[2**63]), 4, "bad shape"),
    ("a size of 2^64 + 4", one(shape=[2**64 + 4]), 4, "bad shape"),
    ("a product that wraps to 0", one(shape=[2**32, 2**32]), 0, "bad shape"),
    ("a product of 2^248", one(shape=[2**31 - 1] * 8), 4, "do not fit"),
    ("a product with a zero", one(shape=[0, 2**31]), 0, "bad shape"),
    ("a number of 5,000 digits", raw_one(shape=f"[{'9' * 5000}]"), 4, "limit|bad"),
    ("nine dimensions", one(shape=[1] * 8 + [4]), 4, "bad shape"),
    ("100,000 dimensions", one(shape=[1] * 100_000), 1, "bad shape"),
    ("a negative offset", one(data_offsets=[-4, 0]), 4, "bad offsets"),
    ("offsets the wrong way round", one(data_offsets=[4, 0]), 4, "do not fit"),
    ("an offset of 2^63", one(data_offsets=[2**63, 2**63 + 4]), 4, "bad offsets"),
    ("one offset", one(data_offsets=[0]), 4, "bad offsets"),
    ("three offsets", one(data_offsets=[0, 4, 4]), 4, "bad offsets"),
    ("offsets of true", one(shape=[1], data_offsets=[False, True]), 1, "bad offsets"),
    ("offsets of text", one(data_offsets=["0", "4"]), 4, "bad offsets"),
    ("offsets that are a number", one(data_offsets=4), 4, "bad offsets"),
    ("too few bytes for the shape", one(dtype="F32"), 4, "do not fit"),
    ("too many bytes for the shape", one(shape=[3]), 4, "do not fit"),
    ("an unknown dtype", one(dtype="F8_E4M3"), 4, "unknown dtype"),
    ("a dtype in lower case", one(dtype="u8"), 4, "unknown dtype"),
    ("a dtype that is a number", one(dtype=8), 4, "unknown dtype"),
    ("a dtype that is a list", one(dtype=["U8"]), 4, "unknown dtype"),
    ("no dtype", one(dtype=None), 4, "other fields"),
    ("no shape", one(shape=None), 4, "other fields"),
    ("no offsets", one(data_offsets=None), 4, "other fields"),
    ("a field too many", one(x=1), 4, "other fields"),
    ("a tensor that is a list", spell({"a": [1]}), 4, "other fields"),
    ("a tensor that is null", spell({"a": None}), 4, "other fields"),
    ("an empty name", spell({"": tensor()}), 4, "name"),
    ("a name with a slash", spell({"../a": tensor()}), 4, "name"),
    ("a name with a line feed", spell({"a\n": tensor()}), 4, "name"),
    ("a name with NUL", spell({"a\0": tensor()}), 4, "name"),
    ("a name with an accent", spell({"ä": tensor()}), 4, "name"),
    ("a name that is half a character", '{"\\ud800":1}', 4, "name"),
    ("a name of 129 characters", spell({"a" * 129: tensor()}), 4, "name"),
    ("metadata that is a list", '{"__metadata__":[]}', 0, "metadata"),
    ("metadata that is null", '{"__metadata__":null}', 0, "metadata"),
    ("metadata of a number", '{"__metadata__":{"a":1}}', 0, "metadata"),
    ("metadata of an object", '{"__metadata__":{"a":{}}}', 0, "metadata"),
    ("metadata of half a character", '{"__metadata__":{"a":"\\ud800"}}', 0, "metadata"),
    ("deep lists", "[" * 1_000_000, 4, "deep"),
    ("deep objects", '{"a":' * 500_000, 4, "deep"),
    ("a deep shape", raw_one(shape="[" * 9000 + "]" * 9000), 4, "deep"),
    ("too many tensors", many(MAX_TENSORS + 1), 0, "4097 tensors"),
    ("a million tensors", many(1_000_000), 0, "header of"),
    ("4 MiB of tensors", many(65_000), 0, "65000 tensors"),
    ("a header of 5 MiB", " " * (5 << 20) + one(), 4, "header of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "data_nbytes", "message"),
    [case[1:] for case in HOSTILE],
    ids=[case[0] for case in HOSTILE],
)
def test_a_hostile_header_is_refused_at_once(header, data_nbytes, message, monkeypatch):
    """Each hostile header is refused for what is wrong with it, after bounded work."""
    octets = header if isinstance(header, bytes) else header.encode("utf-8")
    check, checked = safetensors_header._check_tensor, []

    def counted(name, spec):
        checked.append(name)
        return check(name, spec)

    monkeypatch.setattr(safetensors_header, "_check_tensor", counted)
    with pytest.raises(ValueError, match=message):
        parse_header(octets, data_nbytes)
    assert len(checked) <= MAX_TENSORS


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_every_dtype_has_its_size(dtype):
    """A tensor of each dtype takes as many bytes as its elements have."""
    nbytes = 6 * ITEM_SIZES[dtype]
    header = one(dtype=dtype, shape=[2, 3], data_offsets=[0, nbytes])
    tensors, metadata = parse_header(header.encode(), nbytes)
    assert {"a": (dtype, (2, 3), 0, nbytes)} == tensors
    assert {} == metadata


def test_tensors_come_in_the_order_of_their_bytes():
    """The order in the header does not matter."""
    header = {"z": tensor(offsets=(4, 8)), "a": tensor(offsets=(8, 12)), "m": tensor()}
    tensors, _ = parse_header(spell(header).encode(), 12)
    assert ["m", "z", "a"] == list(tensors)


@pytest.mark.parametrize(
    "header",
    [
        spell({"a": tensor(shape=(), offsets=(0, 1))}),
        spell({"a": tensor(shape=(0, 5), offsets=(0, 0))}),
        spell({"a" * 128: tensor(shape=[1] * 8, offsets=(0, 1))}),
        "{" + META + "}",
        "  {}  ",
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(header):
    """Scalars, empty tensors, eight dimensions and long names are no offence."""
    nbytes = 1 if '"data_offsets":[0,1]' in header else 0
    parse_header(header.encode(), nbytes)


def test_the_largest_header_is_read():
    """A header at both limits is no offence."""
    text = many(MAX_TENSORS)
    text += " " * (MAX_HEADER_BYTES - len(text))
    tensors, _ = parse_header(text.encode(), 0)
    assert MAX_TENSORS == len(tensors)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_floats_must_be_finite_even_where_they_are_allowed(text):
    """Neither NaN nor an infinity, however spelled, is a number here."""
    with pytest.raises(ValueError, match="not allowed"):
        strict_json(f"[{text}]", allow_floats=True)
    assert [1.5] == strict_json("[1.5]", allow_floats=True)


def nested(depth, inside=""):
    """Return lists in lists as text."""
    return "[" * depth + inside + "]" * depth


def test_nesting_has_an_end_that_is_always_the_same():
    """Brackets in texts do not count, nor those that are closed again."""
    texts = json.dumps(["[" * 100, '\\"' + "{" * 100, "]" * 100 + "\\"])
    for text in (nested(MAX_NESTING), texts, f"[{'[{}],' * 100}1]"):
        assert strict_json(text, allow_floats=False) == json.loads(text)
    deep = nested(MAX_NESTING + 1)
    for text in (deep, f'["\\\\",{deep}]', f"[[],{deep}]", nested(900, "{}")):
        with pytest.raises(ValueError, match="deep"):
            strict_json(text, allow_floats=False)


def test_a_caller_that_stands_too_deep_is_told_so():
    """A full stack is no damage: it is never told as a ValueError."""
    told = []

    def dive(depth):
        if depth:
            dive(depth - 1)
        else:
            strict_json(nested(60), allow_floats=True)

    for depth in range(0, sys.getrecursionlimit(), 3):
        try:
            dive(depth)
        except RecursionError:
            told.append(depth)
    assert told


def test_headers_of_the_safetensors_library_are_accepted():
    """What the library writes passes the check."""
    import numpy as np

    data = safetensors.numpy.save(
        {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.uint8)}, {"k": "v"}
    )
    (length,) = struct.unpack("<Q", data[:8])
    tensors, metadata = parse_header(data[8 : 8 + length], len(data) - 8 - length)
    assert {"a", "b"} == set(tensors)
    assert {"k": "v"} == metadata


TEXTS = st.sampled_from(["", "a", "ä", "日本", '"', "\\", "\0", "😀"])
GOOD_NAMES = st.sampled_from(["a", "b", "c.d", "e-f", "0"])
ODD = st.sampled_from(
    [-1, 0, 1, 2**31, 2**32, 2**63, True, None, 1.0, "1", "U8", [], {}, [1], {"a": 1}]
)


@st.composite
def right_headers(draw):
    """Draw the tensors of a right header, and how many bytes of data they have."""
    tensors, position = {}, 0
    for name in draw(st.lists(GOOD_NAMES, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(ITEM_SIZES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        end = position + ITEM_SIZES[dtype] * math.prod(shape)
        tensors[name] = tensor(dtype, shape, (position, end))
        position = end
    if draw(st.booleans()):
        tensors["__metadata__"] = draw(st.dictionaries(TEXTS, TEXTS, max_size=2))
    return tensors, position


@st.composite
def headers(draw):
    """Draw headers that are right or were changed in a place or two."""
    tensors, nbytes = draw(right_headers())
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.integers(0, 3))
        if kind == 0 and tensors:
            name = draw(st.sampled_from(sorted(tensors)))
            fields = tensors[name]
            key = draw(st.sampled_from([*fields, "x"]))
            if key in ("shape", "data_offsets") and isinstance(fields[key], list):
                at = draw(st.integers(0, 3))
                fields[key][at : at + 1] = [draw(ODD)]
            else:
                fields[key] = draw(ODD)
        elif kind == 1 and tensors:
            name = draw(st.sampled_from(sorted(tensors)))
            odd = draw(st.sampled_from(["", "ä", "__metadata__", "a/b", "\ud800"]))
            tensors[odd] = tensors.pop(name)
        elif kind == 2:
            nbytes = max(0, nbytes + draw(st.integers(-1, 1)))
    text = bytearray(spell(tensors).encode())
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text) - 1))
        text[at] = draw(st.integers(0, 255))
    return bytes(text), nbytes


@given(right_headers())
def test_a_right_header_is_accepted(drawn):
    """Our check is no stricter than the format, within its limits."""
    tensors, nbytes = drawn
    described, metadata = parse_header(spell(tensors).encode(), nbytes)
    assert metadata == tensors.pop("__metadata__", {})
    assert set(tensors) == set(described)


@settings(max_examples=400)
@given(headers())
def test_what_we_accept_the_library_accepts_too(drawn):
    """Our check is never laxer than the safetensors library's."""
    header, nbytes = drawn
    try:
        tensors, _ = parse_header(header, nbytes)
    except ValueError:
        return
    data = struct.pack("<Q", len(header)) + header + bytes(nbytes)
    theirs = dict(safetensors.deserialize(data))
    assert {name: list(shape) for name, (_, shape, _, _) in tensors.items()} == {
        name: about["shape"] for name, about in theirs.items()
    }
