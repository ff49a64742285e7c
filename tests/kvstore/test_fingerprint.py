"""Fingerprints: what makes rows differ makes them differ, and nothing else."""

import json
import os
import shutil
import time

import mlx.core as mx
import mlx.nn as nn
import pytest

from kvstore import fingerprint as module
from kvstore.errors import KVStoreError
from kvstore.fingerprint import Fingerprint

CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "hidden_size": 64}


@pytest.fixture(autouse=True)
def _own_cache_home(tmp_path, monkeypatch):
    """Remember hashes in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """A folder with files like a model's, changed long ago."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model-1.safetensors").write_bytes(b"first weights")
    (folder / "model-2.safetensors").write_bytes(b"second weights")
    (folder / "tokenizer.json").write_text("{}")
    age(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    """A folder with files like an adapter's."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"rank": 8}')
    (folder / "adapters.safetensors").write_bytes(b"low rank")
    age(folder)
    return folder


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are read whole."""
    names = []
    original = module._sha256
    monkeypatch.setattr(
        module, "_sha256", lambda path: names.append(path.name) or original(path)
    )
    return names


def age(folder):
    """Let all files of a folder be an hour old."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def configure(model, **changes):
    """Change fields of a model's configuration."""
    (model / "config.json").write_text(json.dumps(CONFIG | changes))


def test_the_same_files_give_the_same_fingerprint(model, tmp_path):
    """A copy of a model elsewhere has the fingerprint of the original."""
    shutil.copytree(model, tmp_path / "copy")
    left, right = map(Fingerprint.from_path, (model, tmp_path / "copy"))
    assert left == right
    assert hash(left) == hash(right)
    assert left.digest == right.digest
    assert left.difference(right) is None
    assert left.label != right.label


CHANGES = {
    "weights": lambda m: (m / "model-2.safetensors").write_bytes(b"second w3ights"),
    "a file more": lambda m: (m / "model-3.safetensors").write_bytes(b"third"),
    "a file less": lambda m: (m / "model-2.safetensors").unlink(),
    "files swapped": lambda m: (
        (m / "model-1.safetensors").rename(m / "x"),
        (m / "model-2.safetensors").rename(m / "model-1.safetensors"),
        (m / "x").rename(m / "model-2.safetensors"),
    ),
    "rope": lambda m: configure(m, rope_theta=500000.0),
    "window": lambda m: configure(m, sliding_window=4096),
    "nested": lambda m: configure(m, rope_scaling={"type": "yarn", "factor": 4.0}),
    "code": lambda m: (m / "modeling.py").write_text("x = 1"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_numbers_changes_the_fingerprint(model, change):
    """Weights, configuration and code of a model matter."""
    before = Fingerprint.from_path(model)
    change(model)
    after = Fingerprint.from_path(model)
    assert before != after
    assert before.digest != after.digest
    assert before.difference(after)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: configure(m, _name_or_path="elsewhere"),
        lambda m: configure(m, name_or_path="elsewhere"),
        lambda m: configure(m, transformers_version="9.9"),
        lambda m: configure(m, use_cache=False),
        lambda m: (m / "tokenizer.json").write_text('{"other": 1}'),
        lambda m: (m / "README.md").write_text("words"),
        lambda m: (m / "generation_config.json").write_text("{}"),
        lambda m: (m / "config.json").write_text(json.dumps(CONFIG, indent=4)),
        lambda m: os.utime(m / "model-1.safetensors"),
    ],
)
def test_what_changes_no_number_does_not_matter(model, change):
    """Names, versions, tokenizer, spelling and times are not compared."""
    before = Fingerprint.from_path(model)
    change(model)
    assert before == Fingerprint.from_path(model)


NAMES = {
    "eos_token_id": [1, 2],
    "pad_token_id": 3,
    "bos_token_id": 4,
    "torch_dtype": "float16",
    "architectures": ["Other"],
    "license": "mit",
}


@pytest.mark.parametrize("kind", ["llama", "qwen3_next", "qwen3_5", "unknown"])
@pytest.mark.parametrize("field", NAMES)
def test_what_names_or_ends_things_does_not_matter(model, kind, field):
    """Whether mlx-lm knows the architecture or not; in a part of a model too."""
    configure(model, model_type=kind, text_config={"hidden_size": 8})
    before = Fingerprint.from_path(model)
    part = {"hidden_size": 8, field: NAMES[field]}
    configure(model, model_type=kind, text_config=part, **{field: NAMES[field]})
    assert before == Fingerprint.from_path(model)


COUNTING = [
    ("llama", "rope_theta", 5.0),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("mistral", "model_type", "qwen2"),
    ("gemma3_text", "sliding_window", 512),
    ("llama", "quantization", {"bits": 4, "group_size": 64}),
    ("llama", "quantization_config", {"quant_method": "mxfp4"}),
    ("qwen3_5", "anything", 1),
    ("unknown", "anything", 1),
]


@pytest.mark.parametrize(("kind", "field", "value"), COUNTING)
def test_what_an_architecture_may_use_matters(model, kind, field, value):
    """All that it knows; all there is where nobody can tell what it knows."""
    configure(model, model_type=kind)
    before = Fingerprint.from_path(model)
    configure(model, **{"model_type": kind, field: value})
    assert before != Fingerprint.from_path(model)


def test_settings_of_a_quantization_may_lie_apart(model):
    """mlx-lm reads `hf_quant_config.json` too."""
    before = Fingerprint.from_path(model)
    (model / "hf_quant_config.json").write_text('{"quantization": {"bits": 4}}')
    assert before.difference(Fingerprint.from_path(model)).startswith("config")


def test_a_field_that_the_code_of_a_model_may_use_matters(model):
    """A model that brings its own code may use any field of its configuration."""
    configure(model, model_file="mine.py")
    before = Fingerprint.from_path(model)
    configure(model, model_file="mine.py", eos_token_id=7)
    assert before != Fingerprint.from_path(model)


MLX = {"format": "mlx"}


@pytest.fixture
def weigh(model):
    """A function that writes the weights anew: a dict of tensors for each file."""

    def write(*parts, metadata=MLX):
        for path in model.glob("*.safetensors"):
            path.unlink()
        for number, tensors in enumerate(parts):
            path = model / f"model-{number}.safetensors"
            mx.save_safetensors(str(path), tensors, metadata)
        age(model)
        return Fingerprint.from_path(model)

    return write


A, B = mx.arange(6, dtype=mx.float16), mx.arange(4, dtype=mx.float32)


def test_how_weights_are_split_does_not_matter(weigh):
    """The same tensors in one file or two, in any order, with other metadata."""
    before = weigh({"a": A, "b": B})
    assert weigh({"a": A}, {"b": B}) == before
    assert weigh({"b": B}, {"a": A}) == before
    assert weigh({"b": B, "a": A}, metadata={"by": "another"}) == before


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": A, "b": B + 1},
        {"a": A, "c": B},
        {"b": A, "a": B},
        {"a": A.reshape(2, 3), "b": B},
        {"a": A.view(mx.int16), "b": B},
        {"a": A},
        {"a": A, "b": B, "c": B},
    ],
)
def test_every_tensor_matters(weigh, tensors):
    """Its name, dtype, shape and bytes."""
    assert weigh({"a": A, "b": B}).difference(weigh(tensors)).startswith("weights")


def test_a_tensor_in_two_files_counts_by_files(weigh):
    """Which of two mlx-lm loads cannot be told, so that the files count as they are."""
    one, other = weigh({"a": A}, {"a": A + 1}), weigh({"a": A + 1}, {"a": A})
    assert one != other


def test_tensors_are_read_once(weigh, model, monkeypatch):
    """Their digest is remembered for other processes, until a file changes."""
    first = weigh({"a": A}, {"b": B})
    read = []
    original = module._read_tensors
    monkeypatch.setattr(
        module, "_read_tensors", lambda path: read.append(path.name) or original(path)
    )
    assert Fingerprint.from_path(model) == first
    assert read == []
    mx.save_safetensors(str(model / "model-1.safetensors"), {"b": B + 1}, MLX)
    assert Fingerprint.from_path(model) != first
    assert read == ["model-0.safetensors", "model-1.safetensors"]


def test_a_draft_model_matters(model, tmp_path):
    """The caches of a draft model follow the model's, so it is part of the whole."""
    draft = shutil.copytree(model, tmp_path / "draft")
    alone = Fingerprint.from_path(model)
    both = alone.with_draft(Fingerprint.from_path(draft))
    assert alone.digest != both.digest
    (draft / "model-1.safetensors").write_bytes(b"other weights")
    other = alone.with_draft(Fingerprint.from_path(draft))
    assert both.difference(other).startswith("draft.weights: stored ")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors"])
def test_an_adapter_matters(model, adapter, name):
    """With, without, and with another adapter are three fingerprints."""
    without = Fingerprint.from_path(model)
    first = Fingerprint.from_path(model, adapter)
    (adapter / name).write_bytes(b'{"rank": 9}')
    second = Fingerprint.from_path(model, adapter)
    assert 3 == len({without.digest, first.digest, second.digest})
    assert without.difference(first).startswith("adapter: stored null, given ")


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"a": 2}, "a: stored 1, given 2"),
        ({"a": 1}, {}, "a: stored 1, given nothing"),
        ({}, {"a": None}, "a: stored nothing, given null"),
        ({"c": {"r": {"t": 1e4}}}, {"c": {"r": {"t": 5e5}}},
         "c.r.t: stored 10000.0, given 500000.0"),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, "a: stored 1, given 2"),
        ({"a": "x" * 64}, {"a": "y" * 64},
         f'a: stored "{"x" * 12}…, given "{"y" * 12}…'),
        ({"a": 1}, {"a": True}, "a: stored 1, given true"),
        ({"a": 1}, {"a": 1.0}, "a: stored 1, given 1.0"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a: stored [1, 2], given [1, 3]"),
        ({"a": {}}, {"a": []}, "a: stored {}, given []"),
    ],
)  # fmt: skip
def test_a_difference_names_the_first_field_and_both_values(stored, given, expected):
    """The first field that differs, in order of names, is shown as it is."""
    assert expected == Fingerprint(stored).difference(Fingerprint(given))


@pytest.mark.parametrize(
    ("left", "right"),
    [({"a": 1}, {"a": 1.0}), ({"a": 1}, {"a": True}), ({"a": None}, {}),
     ({"a": "1"}, {"a": 1}), ({"a": {}}, {"a": []})],
)  # fmt: skip
def test_a_difference_and_another_digest_go_together(left, right):
    """Where a field differs, the digest does, and the other way round."""
    one, other = Fingerprint(left), Fingerprint(right)
    assert one.digest != other.digest
    assert one.difference(other)
    assert one != other


def test_the_digest_is_frozen():
    """A digest is the same in every release."""
    fields = {"version": 1, "weights": "ab", "config": {"rope_theta": 1e4}}
    assert (
        "67a34e943cd3358c32f81586a196e94a2b5e77b2efea4e53da37684ccf7f8167"
        == Fingerprint(fields).digest
    )


def test_a_second_call_reads_no_weights(model, adapter, hashed):
    """Each file is hashed once, and remembered for other processes."""
    first = Fingerprint.from_path(model, adapter)
    assert ["model-1.safetensors", "model-2.safetensors", "adapter_config.json",
            "adapters.safetensors"] == hashed  # fmt: skip
    hashed.clear()
    assert first == Fingerprint.from_path(model, adapter)
    assert [] == hashed


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_noticed(model, hashed, keep_times):
    """A file of the same size is read again, even where its time was put back."""
    first = Fingerprint.from_path(model)
    path = model / "model-1.safetensors"
    status = path.stat()
    path.write_bytes(b"other weights")
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert status.st_size == path.stat().st_size
    hashed.clear()
    assert first != Fingerprint.from_path(model)
    assert ["model-1.safetensors"] == hashed


def test_a_file_changed_just_now_is_not_remembered(model, hashed):
    """A file may change twice within the grain of its time."""
    soon = time.time() + 3600  # it stays just now, however long this takes
    os.utime(model / "model-1.safetensors", (soon, soon))
    Fingerprint.from_path(model)
    hashed.clear()
    Fingerprint.from_path(model)
    assert ["model-1.safetensors"] == hashed


@pytest.mark.parametrize(
    "memory", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": 1}', b"[" * 90_000]
)
def test_a_damaged_memory_costs_hashing_again(model, tmp_path, memory):
    """What is remembered is only a saving of time."""
    first = Fingerprint.from_path(model)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(memory)
    assert first == Fingerprint.from_path(model)


def test_a_home_that_cannot_be_written_costs_hashing_again(
    model, tmp_path, monkeypatch
):
    """A read-only home is no reason to fail."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Fingerprint.from_path(model) == Fingerprint.from_path(model)


def test_a_file_in_a_hugging_face_cache_is_named_by_its_hash(model, tmp_path, hashed):
    """A link to `blobs/<SHA-256>` is believed, and gives the same fingerprint."""
    plain = Fingerprint.from_path(model)
    blobs = tmp_path / "hub" / "blobs"
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.glob("*.safetensors"):
        blob = blobs / module._sha256(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    shutil.copy(model / "config.json", snapshot)
    hashed.clear()
    assert plain == Fingerprint.from_path(snapshot)
    assert [] == hashed


@pytest.mark.parametrize("name", ["ab" * 20, "AB" * 32, "ab" * 32 + ".incomplete"])
def test_other_names_in_a_blobs_folder_are_no_hashes(model, tmp_path, hashed, name):
    """Only 64 hex digits are a SHA-256; small files there bear another hash."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in model.glob("*.safetensors"):
        path.rename(blobs / f"{path.name}-{name}")
        path.symlink_to(blobs / f"{path.name}-{name}")
    Fingerprint.from_path(model)
    assert 2 == len(hashed)


@pytest.mark.parametrize(
    "text",
    ["Infinity", "-Infinity", "NaN", "1e999", '"\\ud800"', "10000000000000000000"],
)
def test_odd_numbers_in_a_configuration_are_no_obstacle(model, text):
    """Some configurations hold infinities; they count like any value."""
    plain = Fingerprint.from_path(model)
    (model / "config.json").write_text(f'{{"model_type": "llama", "limit": {text}}}')
    odd = Fingerprint.from_path(model)
    assert odd == Fingerprint.from_path(model)
    assert odd.digest != plain.digest


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 90_000])
def test_a_configuration_that_is_none_is_an_error_of_ours(model, text):
    """A broken config.json is named."""
    (model / "config.json").write_text(text)
    with pytest.raises(KVStoreError, match=r"config\.json"):
        Fingerprint.from_path(model)


def test_a_folder_without_a_model_is_an_error_with_a_hint(tmp_path, model, adapter):
    """The error says which folder lacks what."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(KVStoreError, match="no safetensors file") as caught:
        Fingerprint.from_path(tmp_path / "empty")
    assert caught.value.hint
    (adapter / "adapters.safetensors").unlink()
    with pytest.raises(KVStoreError, match=r"adapters\.safetensors is missing"):
        Fingerprint.from_path(model, adapter)
    (model / "config.json").unlink()
    with pytest.raises(KVStoreError, match=r"no such file: .*config\.json"):
        Fingerprint.from_path(model)


class Tiny(nn.Module):
    """A model of two layers."""

    def __init__(self, seed=0):
        super().__init__()
        mx.random.seed(seed)
        self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
        self.args = {"rope_theta": 1e4, "limit": float("inf")}


def test_a_live_model_has_a_fingerprint():
    """The same parameters give the same fingerprint."""
    assert Fingerprint.of(Tiny()) == Fingerprint.of(Tiny())
    assert Fingerprint.of(Tiny()) != Fingerprint.of(Tiny(1))


def change_weight(model):
    """Change one number of one weight in its last bit."""
    weight = model.layers[1].weight.view(mx.uint32)
    weight[3, 5] ^= 1
    model.layers[1].weight = weight.view(mx.float32)


def change_config(model):
    """Change a field of the configuration."""
    model.args["rope_theta"] = 5e5


def change_dtype(model):
    """Hold the bits as other numbers."""
    model.layers[0].bias = model.layers[0].bias.view(mx.int32)


def change_shape(model):
    """Hold the numbers in another shape."""
    model.layers[0].weight = model.layers[0].weight.reshape(4, 16)


def swap_layers(model):
    """Let two layers change places."""
    model.layers = model.layers[::-1]


def add_adapter(model):
    """Give a layer one more parameter."""
    model.layers[0].lora = mx.zeros((1,))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_config,
        change_dtype,
        change_shape,
        swap_layers,
        add_adapter,
    ],
)
def test_one_change_to_a_live_model_is_noticed(change):
    """A bit of a weight, a field, a dtype, a shape, an order: each matters."""
    model = Tiny()
    before = Fingerprint.of(model)
    change(model)
    assert before != Fingerprint.of(model)
    assert before.difference(Fingerprint.of(model))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.uint32])
def test_parameters_of_any_dtype_are_hashed(dtype):
    """Half precision and packed integers are hashed as their bytes."""
    model = Tiny()
    model.layers[0].weight = mx.arange(64).reshape(8, 8).astype(dtype)
    before = Fingerprint.of(model)
    model.layers[0].weight = mx.arange(1, 65).reshape(8, 8).astype(dtype)
    assert before != Fingerprint.of(model)


def test_files_and_live_never_match(model):
    """What was hashed from files and what from memory are not comparable."""
    files, live = Fingerprint.from_path(model), Fingerprint.of(Tiny())
    assert files != live
    same = {**files.fields, "source": "live"}
    assert files.digest != Fingerprint(same).digest
    assert 'source: stored "files", given "live"' == files.difference(Fingerprint(same))


def test_a_fingerprint_survives_a_shard(tmp_path, store_path, caches, model):
    """What a store gives back differs in nothing from what it was given."""
    import kvstore

    given = Fingerprint.from_path(model)
    with kvstore.Store(store_path, codec="raw") as store:
        tokens, cache = caches.make_conversation(1, 1)
        store.save(tokens, cache, given, name="x")
        stored = store.fingerprint_of("x")
    assert stored == given
    assert stored.difference(given) is None


def test_the_strength_of_an_adapter_counts():
    """Two live models that differ in a scalar of a module differ."""

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.weight = mx.ones((2, 2))
            self.scale = scale

    one, other, same = (Fingerprint.of(Scaled(s)) for s in (1.0, 20.0, 1.0))
    assert one != other
    assert one == same
