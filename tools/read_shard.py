"""Restore the entries of a store without kvstore; written from docs/FORMAT.md alone.

Needs NumPy 2, blake3 and zstandard. Usage: read_shard.py STORE [ENTRY]
"""

import json
import re
import sys
from hashlib import sha256, shake_128
from pathlib import Path
from statistics import NormalDist
from struct import pack

import numpy as np
import zstandard
from blake3 import blake3

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}
DTYPES |= {"U32": "<u4", "I32": "<i4", "I64": "<i8"}
canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
LARGEST = {"F32": 2.0**128 - 2.0**104, "F16": 65504.0, "BF16": 2.0**128 - 2.0**120}


def check(condition, why):
    if not condition:
        raise ValueError(why)


def read_entries(store):
    """Yield the fields of each entry of a store (sections 4 and 5)."""
    check(json.loads((store / "config.json").read_bytes())["format"] == 1, "too new")
    for path in sorted(store.glob("entries/*.json")):
        entry = json.loads(data := path.read_bytes())
        rest = data.replace(b'"digest":"%s",' % entry["digest"].encode(), b"", 1)
        check(blake3(rest).hexdigest() == entry["digest"], f"{path} is damaged")
        is_whole = data.decode() == canonical(entry) and path.stem == entry["id"]
        check(is_whole and entry["format"] == 1, f"{path} is no entry of format 1")
        yield entry


def read_shard(path):
    """Return the block table, each block with its tensors and its origin (7)."""
    file = path.read_bytes()
    size = int.from_bytes(file[:8], "little")
    check(size <= min(2**22, len(file) - 8), "the header is too long")
    header, data = file[8 : 8 + size], file[8 + size :]
    text = (tensors := json.loads(header)).pop("__metadata__")["kvstore"]
    check(text == canonical(about := json.loads(text)), "the metadata is not canonical")
    field, digest = b'\\"header_digest\\":\\"%s\\"', about["header_digest"]
    blank = header.replace(field % digest.encode(), field % (b"0" * 64))
    check(blake3(blank).hexdigest() == digest, f"the header of {path} is damaged")
    blocks, position = about["blocks"], 0
    is_small = len(blocks) <= 64 and len(tensors) <= 4096
    check(is_small and about["format"] == 1, f"{path} is no shard of format 1")
    owned = {str(number): {} for number in range(len(blocks))}
    for name, spec in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = spec["data_offsets"]
        check(begin == position <= end <= len(data), f"tensor {name} has bad offsets")
        number, _, rest = name.partition(".")
        owned[number][rest] = (spec["dtype"], tuple(spec["shape"]), data[begin:end])
        position = end
    check(position == len(data), "something follows the last tensor")
    digest = sha256(canonical(about["fingerprint"]).encode()).hexdigest()
    origin = ["kvstore root 1", digest, about["layout"]]
    root = sha256(canonical(origin).encode()).hexdigest()
    for block, mine in zip(blocks, owned.values(), strict=True):
        digest = blake3(b"".join(part for _, _, part in mine.values())).hexdigest()
        tokens = pack(f"<{len(block['tokens'])}q", *block["tokens"])
        chained = sha256(bytes.fromhex(block["parent"]) + tokens).hexdigest()
        check(digest == block["digest"] and chained == block["hash"], "damaged block")
        block |= {"tensors": mine, "stop": block["start"] + len(block["tokens"])}
        block |= {"root": root, "layout": about["layout"], "bits": block.get("bits", 0)}
    return blocks


def restore(store, entry):
    """Return tokens, and each layer's (H, T, D) by name, BF16 as float32 (7.4, 8)."""
    paths = store.glob("shards/??/*.safetensors")
    copies = [block for path in paths for block in read_shard(path)]
    copies.sort(key=lambda c: (c["extras"], c["exact"], c["bits"], c["lossless"]))
    best = {copy["hash"]: copy for copy in copies if copy["root"] == entry["root"]}
    chain, name, stop = [], entry["tip"], entry["num_tokens"]
    while stop > 0:
        check(name in best and best[name]["stop"] == stop, f"block {name} is missing")
        chain.insert(0, best[name])
        name, stop = chain[0]["parent"], chain[0]["start"]
    check(name == entry["root"], "the first block has another root")
    layers, groups = chain[0]["layout"], {}
    while any("caches" in layer for layer in layers):
        layers = [each for layer in layers for each in layer.get("caches", [layer])]
    for number, layer in enumerate(layers):
        groups.setdefault(canonical(layer), []).append(number)
    restored = [{} for _ in layers]
    for group, members in enumerate(groups.values()):
        params = layers[members[0]]["params"]
        for name, *spec in layers[members[0]]["rows"]:
            parts = [*read(chain, f"{group}.{name}.", len(members), params, *spec)]
            check(parts or spec[-1] != "state", f"{name} is missing")
            for i, number in enumerate(members if parts else ()):
                restored[number][name] = np.concatenate([p[i] for p in parts], axis=1)
    return [token for block in chain for token in block["tokens"]], restored


def read(chain, prefix, n, params, h, d, dtype, begin, end, kind):
    """Yield what each block has of one array, (L, H, T, D) (8.2 and 8.3)."""
    width = n * h * d * np.dtype(DTYPES[dtype]).itemsize
    if kind == "window":
        kept = params["max_size" if "max_size" in params else "chunk_size"]
        begin += max(0, chain[-1]["stop"] - kept)
    for block in chain if kind in ("rows", "window") else chain[-1:]:
        mine = [item for item in block["tensors"].items() if item[0].startswith(prefix)]
        nbytes = sum(block["raw"].get(name, len(t[2])) for name, t in mine)
        stop = block["stop"] if end is None else min(block["stop"], end)
        held = nbytes // width if kind != "rows" else stop - max(block["start"], begin)
        first = stop - held if kind != "window" else max(block["start"], begin)
        if first < stop:
            check(held >= stop - first, f"{prefix} lacks rows of the window")
            rows = decode(block, prefix, params, stop - held, (n, h, held, d), dtype)
            rows = rows[:, :, first - stop :]
            yield (rows.astype("<u4") << 16).view("<f4") if dtype == "BF16" else rows


def decode(block, prefix, params, start, shape, dtype):
    """Return the rows of one array of one block; BF16 as its bits (9 and 10)."""
    pattern = r"(raw|planes|turbo([1-8])(v(?!\2)[1-8])?)(\+zstd)?"
    check(re.fullmatch(pattern, block["codec"]), f"codec {block['codec']} is unknown")
    (codec, zstd, _), array = block["codec"].partition("+zstd"), prefix.split(".", 1)[1]
    check(block["lossless"] != codec.startswith("turbo"), "codec and block disagree")

    def part(name, dtype, shape):
        kind, is_frame = np.dtype(DTYPES[dtype]), zstd and name != "low"
        was, size, data = block["tensors"][prefix + name]
        if is_frame:
            sizes = {zstandard.frame_content_size(data), block["raw"][prefix + name]}
            check(sizes == {int(np.prod(shape)) * kind.itemsize}, f"{name} is too long")
            frame = zstandard.ZstdDecompressor(max_window_size=2**23)
            data = frame.decompress(data, allow_extra_data=False)
        check(is_frame or (was, size) == (dtype, shape), f"{name} has a bad shape")
        return np.frombuffer(data, kind).reshape(shape)

    if array[1:] == ".coded." and prefix + "norms" in block["tensors"]:
        codec = f"turbo{params['k_bits']}v{params['v_bits']}"
    elif codec.startswith("turbo") and array not in ("k.", "v."):
        codec = "planes" if zstd else "raw"
    if codec == "raw":
        return part("rows", dtype, shape)
    if codec == "planes":
        size, high = np.dtype(DTYPES[dtype]).itemsize, part("high", "U8", shape)
        low = part("low", "U8", (size - 1, *shape)) if size > 1 else ()
        return np.stack([*low, high], axis=-1).view(DTYPES[dtype])[..., 0]
    (*outer, tokens, dim), is_key = shape, array in ("k.", "k.coded.")
    sinks, bits = max(0, min(4 - start, tokens)), int(codec[5 if is_key else -1])
    coded, symbols, number = (*outer, tokens - sinks), 0, 0
    for width in (w for w in (8, 4, 2, 1) if bits & w):
        plane = part(f"codes{number or ''}", "U8", (*coded, dim * width // 8))
        fields = [plane.astype(int) >> i & 2**width - 1 for i in range(0, 8, width)]
        symbols, number = symbols << width | np.concatenate(fields, axis=-1), number + 1
    if bits in (3, 5, 7):
        symbols = 2 ** (bits - 1) + (symbols >> 1 ^ -(symbols & 1))
    y, start = levels(bits)[symbols], 0
    for size in (2**i for i in range(31, -1, -1) if dim & 2**i):
        place, n = slice(start, start + size), np.arange(size)
        signs = 1.0 - 2.0 * (np.bitwise_count(n[:, None] & n) % 2)
        y[..., place] = y[..., place] @ signs / (size * dim) ** 0.5
        start += size
    stream = shake_128(b"turboquant/wh-rotation/1" + pack("<QI", 0, dim))
    flips = np.unpackbits(np.array([*stream.digest(dim // 8)], "u1"), bitorder="little")
    norms = np.stack([*part("norms", "U8", (4, *coded))], -1).view("<f4").astype(float)
    mean = part("mean", "F16", (*outer, dim))[:, :, None] if is_key else np.zeros(1)
    norms, mean = (np.where(np.isfinite(x), x, np.nan) for x in (norms, mean))
    x = y * (1.0 - 2.0 * flips) * norms + mean
    x = np.clip(x, -LARGEST[dtype], LARGEST[dtype])
    x = x.astype("<f2" if dtype == "F16" else "<f4")
    if dtype == "BF16":
        x = ((n := x.view("<u4")) + 0x7FFF + (n >> 16 & 1) >> 16).astype("<u2")
    first = [part("sinks", dtype, (*outer, sinks, dim))] if sinks else []
    return np.concatenate([*first, x], axis=2)


def levels(bits):
    """Solve for the Lloyd-Max levels by Newton's method (10.3)."""
    normal, count = NormalDist(), 2**bits
    x = np.array([1.7 * normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(20):
        bounds = (x[1:] + x[:-1]) / 2
        density = np.array([0, *map(normal.pdf, bounds), 0])
        mass = np.diff([0, *map(normal.cdf, bounds), 1])
        mean, half = -np.diff(density) / mass, density[1:-1] / 2
        slope = np.diag(half * (bounds - mean[:-1]) / mass[:-1], 1)
        slope += np.diag(half * (mean[1:] - bounds) / mass[1:], -1)
        x = x - np.linalg.solve(np.eye(count) - slope - np.diag(slope.sum(1)), x - mean)
    return (x - x[::-1]) / 2


if __name__ == "__main__":
    for entry in read_entries(store := Path(sys.argv[1])):
        print(entry["id"], entry["name"], entry["num_tokens"], entry["codec"])
        is_wanted = {entry["id"], entry["name"]} & {*sys.argv[2:]}
        for number, layer in enumerate(restore(store, entry)[1] if is_wanted else ()):
            print(number, {name: rows.shape for name, rows in layer.items()})
