"""A codec and a cache class from outside: one class each, and nothing else changes."""

import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import kvstore
from kvstore import codecs
from kvstore.caches import kinds
from kvstore.caches.kinds.plain import PlainRows
from kvstore.codecs import register_codec


class Inverted:
    """A toy codec: rows whose bits are all inverted."""

    name = "inverted"
    usual_names = ("inverted",)
    is_lossless = True

    @classmethod
    def from_name(cls, name):
        """Return the codec if it is the one named."""
        return cls() if name == cls.name else None

    def parts(self, rows):
        """Return the one part."""
        return {"bits": (rows.dtype, rows.shape)}

    def is_compressible(self, part):
        """Say whether zstd is worth its time on a part."""
        return True

    def encode(self, layers, rows):
        """Invert all bits."""
        x = np.stack(layers)
        return {"bits": (~x.view(np.uint8)).view(x.dtype)}

    def decode_into(self, parts, rows, layers):
        """Invert the bits of each layer again."""
        for bits, out in zip(parts["bits"], layers, strict=True):
            kept = np.ascontiguousarray(bits[:, : out.shape[1]])
            out[...] = (~kept.view(np.uint8)).view(kept.dtype)

    def decode(self, parts, rows):
        """Invert all bits again."""
        from kvstore.codecs.raw import Raw

        return Raw().decode({"rows": self.encode(parts["bits"], rows)["bits"]}, rows)


class ToyCache(KVCache):
    """A cache of a class that mlx-lm does not have."""


class ToyRows(PlainRows):
    """What the store has to know of it."""

    name = "ToyCache"

    def owns(self, cache):
        """Say whether a cache is of this class."""
        return type(cache) is ToyCache

    def build(self, layout, buffers, num_tokens):
        """Build a cache of this class."""
        cache = super().build(layout, buffers, num_tokens)
        cache.__class__ = ToyCache
        return cache


@pytest.fixture
def registered(monkeypatch):
    """Register both; they go again."""
    monkeypatch.setattr(codecs, "_FAMILIES", list(codecs._FAMILIES))
    monkeypatch.setattr(kinds, "_OF_CLASS", {})
    monkeypatch.setattr(kinds, "_KINDS", list(kinds._KINDS))
    register_codec(Inverted)
    kvstore.register_kind(ToyRows())
    yield
    codecs.get_codec.cache_clear()


@pytest.mark.parametrize("codec", ["inverted", "inverted+zstd"])
@pytest.mark.usefixtures("registered")
def test_a_toy_codec_and_a_toy_class_are_stored(tmp_path, caches, codec):
    """They are saved, found, restored to the bit, verified, exported and imported."""
    tokens = list(range(600))
    cache = caches.grow([ToyCache(), ToyCache()], caches.random_rows(600, 1))
    bundle = tmp_path / "toy.kvbundle"
    with kvstore.Store(tmp_path / "a", codec=codec) as store:
        store.save(tokens, cache, caches.MODEL, name="toy")
        assert {stored.codec for _, stored in store.chain("toy")[:2]} == {codec}
        with bundle.open("wb") as file:
            store.export_bundle("toy", file)
    with kvstore.Store(tmp_path / "b") as store, bundle.open("rb") as file:
        store.import_bundle(file)
        restored, rest = store.load([*tokens, 1], caches.MODEL)
        assert store.verify(read_data=True) == []
    assert rest == [1]
    assert {type(layer) for layer in restored} == {ToyCache}
    assert caches.rows_of(restored) == caches.rows_of(cache)
    assert codec in kvstore.codec_names()


@pytest.mark.usefixtures("registered")
def test_a_name_belongs_to_one_codec():
    """A second codec of a name is refused, and so is one that takes a known name."""
    with pytest.raises(ValueError, match="codec `inverted` already"):
        register_codec(Inverted)
    thief = type("Thief", (Inverted,), {"usual_names": ("turbo4",)})
    with pytest.raises(ValueError, match="codec `turbo4` already"):
        register_codec(thief)


def test_blocks_of_an_unknown_codec_are_not_loaded(tmp_path, caches, monkeypatch):
    """Without the codec, its blocks are a miss and stay as they are."""
    monkeypatch.setattr(codecs, "_FAMILIES", [*codecs._FAMILIES, Inverted])
    tokens = list(range(300))
    cache = caches.make_cache(300, 1)
    with kvstore.Store(tmp_path / "a", codec="inverted") as store:
        store.save(tokens, cache, caches.MODEL, name="toy")
    monkeypatch.undo()
    codecs.get_codec.cache_clear()
    with kvstore.Store(tmp_path / "a") as store:
        restored, rest = store.load([*tokens, 1], caches.MODEL)
        assert restored is None
        assert len(rest) == 301
    codecs.get_codec.cache_clear()
    monkeypatch.setattr(codecs, "_FAMILIES", [*codecs._FAMILIES, Inverted])
    with kvstore.Store(tmp_path / "a") as store:
        assert store.load([*tokens, 1], caches.MODEL)[1] == [1]
    codecs.get_codec.cache_clear()
