"""Hostile files, each with its name; the same on every run.

What is hostile to every format is bytes; what is hostile to JSON is a text, which each
reader's test puts to where its format has JSON.
"""

import random
import struct

TERABYTE = 1 << 40


def _random(size):
    return random.Random(9).randbytes(size)


def _safetensors(header, length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header


def _tensor(**changes):
    spec = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | changes
    fields = ",".join(f'"{name}":{value}' for name, value in spec.items())
    return f'{{"x":{{{fields}}}}}'.encode()


BYTES = {
    "nothing": b"",
    "one byte": b"{",
    "zeros": bytes(65_536),
    "ones": b"\xff" * 65_536,
    "noise": _random(65_536),
    "an archive of zeros": bytes(1024),
    "a header of 2^63 bytes": _safetensors(b"{}", 2**63),
    "a header of 2^64 - 1 bytes": _safetensors(b"{}", 2**64 - 1),
    "a header of 99 MB that is not there": _safetensors(b"{}", 99_000_000),
    "a tensor of 2^62 numbers": _safetensors(_tensor(shape=f"[{2**31},{2**31}]")),
    "a shape that overflows": _safetensors(_tensor(shape=f"[{2**63},{2**63},0]")),
    "offsets of 2^63": _safetensors(_tensor(data_offsets=f"[0,{2**63}]")),
    "a negative offset": _safetensors(_tensor(data_offsets="[-4,0]") + bytes(4)),
    "10,000 dimensions": _safetensors(_tensor(shape=str([1] * 10_000))),
}
"""Files that are of no format, or lie about how long they are."""

JSON = {
    "100,000 open lists": b"[" * 100_000,
    "50,000 lists": b"[" * 50_000 + b"]" * 50_000,
    "50,000 objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of 100,000 digits": b"9" * 100_000,
    "a number beyond floats": b"1e999",
    "no number": b"NaN",
    "two keys of one name": b'{"format":1,"format":1}',
    "20,000 keys": b"{%s}" % b",".join(b'"k%d":0' % i for i in range(20_000)),
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "an empty object": b"{}",
    "half a character": b'{"format":"\\ud800"}',
    "a byte that is no UTF-8": b'{"format":"\xff"}',
    "UTF-16": '{"format":1}'.encode("utf-16"),
    "a zero behind it": b'{"format":1}\0',
    "a format that is true": b'{"format":true}',
    "a format of 2^200": b'{"format":%d}' % 2**200,
}
"""Texts that are no JSON, or not what any format has in it."""


def damaged(data):
    """Return what can happen to a good file, by name."""
    return {
        **{f"cut at {n} of 7": data[: len(data) * n // 7] for n in range(1, 7)},
        "without its last byte": data[:-1],
        "without its first byte": data[1:],
        "twice": data * 2,
        "with a byte more": data + b"\0",
    }
