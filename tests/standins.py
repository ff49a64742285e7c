"""Stand-ins for other people's servers, with exactly the seams that recipes use.

They are not installed for tests. Each class has the names, the arguments and the order
of calls of the commit that its recipe names, and nothing else. The recipes are run
with the real packages by hand: docs/EMBEDDING.md has the results.
"""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    LRUPromptCache,
    make_prompt_cache,
    trim_prompt_cache,
)


def put_modules(monkeypatch, **contents):
    """Have modules found by their names, in which `__` stands for a dot."""
    for name, values in contents.items():
        path = name.split("__")
        for depth in range(1, len(path) + 1):
            full = ".".join(path[:depth])
            if full not in sys.modules:
                module = ModuleType(full)
                monkeypatch.setitem(sys.modules, full, module)
                if depth > 1:
                    setattr(
                        sys.modules[full.rpartition(".")[0]], path[depth - 1], module
                    )
        for key, value in values.items():
            setattr(sys.modules[".".join(path)], key, value)


def feed(model, tokens, prompt_cache):
    """Compute the rows of tokens; return what the model says after the last one."""
    logits = model(mx.array([tokens]), cache=prompt_cache)[0, -1]
    mx.eval(logits, [layer.state for layer in prompt_cache])
    return logits.tolist()


def run_on_a_thread(work, *arguments, **named):
    """Return what a call returns on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments, **named).result()


def put_mlx_engine(monkeypatch):
    """Make a stand-in for mlx-engine 08f0c07; return its two kinds of model kit."""

    class CacheWrapper:
        def __init__(self, model, max_kv_size, *, kv_bits=None):
            self.model, self._draft_model, self._max_kv_size = model, None, max_kv_size
            self._history_capacity = 10
            self._kv_cache_qtn_params = {
                "kv_bits": kv_bits,
                "kv_group_size": 32,
                "quantized_kv_start": 0,
            }
            self._history = self._make_history()
            self._live_tokens, self._live_cache = None, self._make_cache()

        def _make_cache(self):
            return make_prompt_cache(self.model, self._max_kv_size)

        def _make_history(self):
            return LRUPromptCache(max_size=self._history_capacity)

        def _flush_live_cache(self):
            if self._live_tokens is not None:
                held = self._live_tokens[: self._live_cache[0].offset]
                live = copy.deepcopy(self._live_cache)
                self._history.insert_cache(
                    "session", held, live, cache_type="assistant"
                )

        def update_cache(self, tokens):
            self._flush_live_cache()
            found, rest = self._history.fetch_nearest_cache("session", tokens)
            self._live_cache, self._live_tokens = found or self._make_cache(), tokens
            return rest

    class ModelKit:
        cache_wrapper = None

        def __init__(self, model_path, max_kv_size=None, kv_bits=None):
            self._executor, self._shutdown = ThreadPoolExecutor(1), threading.Event()
            load = self._full_model_init
            given = {"max_kv_size": max_kv_size, "kv_bits": kv_bits}
            self._executor.submit(load, model_path, 2048, **given).result()

        def _full_model_init(
            self, model_path, prefill_step_size, max_kv_size=None, kv_bits=None
        ):
            self.model = mlx_lm.load(str(model_path))[0]
            self.cache_wrapper = CacheWrapper(self.model, max_kv_size, kv_bits=kv_bits)

        def generate(self, tokens):
            """Return how many tokens were found, and what the model says next."""

            def work():
                wrapper = self.cache_wrapper
                rest = wrapper.update_cache(tokens)
                params = wrapper._kv_cache_qtn_params
                # The last token is fed alone.
                for part in filter(None, (rest[:-1], rest[-1:])):
                    says = feed(self.model, part, wrapper._live_cache)
                    maybe_quantize_kv_cache(wrapper._live_cache, **params)
                return len(tokens) - len(rest), says

            return self._executor.submit(work).result()

        def shutdown(self):
            self._shutdown.set()
            self._executor.shutdown()

        def is_shutdown(self):
            return self._shutdown.is_set()

    def make_chunk(before, ids, spans, start, end):
        return SimpleNamespace(start=start, end=end, key=f"{before}|{ids[start:end]}")

    class VlmPromptCacheCoordinator:
        hot = None

        def restore(self, *, prompt_input_ids, image_spans):
            return self._restore_best_prefix(
                prompt_input_ids=prompt_input_ids, image_spans=image_spans
            )

        def _restore_best_prefix(self, *, prompt_input_ids, image_spans):
            hot, self.hot = self.hot, None
            if hot is None or hot["image_spans"] != image_spans:
                return None
            held = hot["prompt_input_ids"]
            if held != prompt_input_ids[: len(held)]:
                return None
            return RestoredPromptCache(len(held), hot["prompt_cache"], None)

        def save_prompt_cache_snapshot(self, prompt_cache, chunks, start, end, length):
            raise AssertionError("its own disk tier is asked")

        def store_hot_prompt_cache(self, **given):
            self.hot = given

    class RestoredPromptCache:
        def __init__(self, cached_prefix_len, prompt_cache, rope_deltas):
            self.cached_prefix_len = cached_prefix_len
            self.prompt_cache = prompt_cache

    class BatchedVisionModelKit:
        def __init__(self, model_path):
            self._model_path = model_path
            self._prompt_cache_store = SimpleNamespace(can_store_records=lambda: True)
            self._prompt_cache_coordinator = VlmPromptCacheCoordinator()
            run_on_a_thread(self._load_model)

        def _load_model(self):
            self.model = mlx_lm.load(str(self._model_path))[0]

        def generate(self, ids, spans=()):
            """Return how many tokens were found, and what the model says next."""
            coordinator = self._prompt_cache_coordinator
            restored = run_on_a_thread(
                coordinator.restore, prompt_input_ids=ids, image_spans=list(spans)
            )
            held = restored.cached_prefix_len if restored else 0
            cache = restored.prompt_cache if restored else make_prompt_cache(self.model)
            made, before = [], ""
            for start in range(0, len(ids) - 255, 256):
                make = sys.modules[CHUNKS]._make_prefix_cache_chunk
                made.append(make(before, ids, spans, start, start + 256))
                before = made[-1].key
            for chunk in made:
                if held < chunk.end < len(ids):
                    feed(self.model, ids[held : chunk.end], cache)
                    coordinator.save_prompt_cache_snapshot(
                        cache, made, held // 256, chunk.end // 256, chunk.end
                    )
                    held = chunk.end
            found = restored.cached_prefix_len if restored else 0
            says = feed(self.model, ids[held:], cache)
            coordinator.store_hot_prompt_cache(
                prompt_input_ids=ids,
                image_spans=list(spans),
                prompt_cache=cache,
                rope_deltas=None,
            )
            return found, says

        def shutdown(self):
            self.model = None

    put_modules(
        monkeypatch,
        mlx_engine__generate={
            "get_kv_cache_quantization_params": lambda *given: given,
        },
        mlx_engine__cache_wrapper={"CacheWrapper": CacheWrapper},
        mlx_engine__model_kit__model_kit={"ModelKit": ModelKit},
        mlx_engine__model_kit__batched_vision__model_kit={
            "BatchedVisionModelKit": BatchedVisionModelKit
        },
        mlx_engine__model_kit__batched_vision__prompt_cache__chunks={
            "_make_prefix_cache_chunk": make_chunk
        },
        mlx_engine__model_kit__batched_vision__prompt_cache__coordinator={
            "VlmPromptCacheCoordinator": VlmPromptCacheCoordinator,
            "RestoredPromptCache": RestoredPromptCache,
        },
        mlx_vlm__models__cache={"make_prompt_cache": make_prompt_cache},
    )
    return ModelKit, BatchedVisionModelKit


CHUNKS = "mlx_engine.model_kit.batched_vision.prompt_cache.chunks"


def put_mlx_openai_server(monkeypatch):
    """Make a stand-in for mlx-openai-server 4b7d4b6; return its handler."""

    class LRUPromptCache:
        def close(self):
            pass

    class MLXLMHandler:
        def __init__(self, model_path, *, prompt_cache_size=10):
            model = mlx_lm.load(str(model_path))[0]
            self.model = SimpleNamespace(
                model=model,
                draft_model=None,
                create_prompt_cache=lambda: make_prompt_cache(model),
            )
            self.prompt_cache = LRUPromptCache()

        def generate(self, tokens):
            """Return how many tokens were found, and what the model says next."""
            found, rest = self.prompt_cache.fetch_nearest_cache(
                tokens, allowed_sources={"nonbatch"}
            )
            cache = found or self.model.create_prompt_cache()
            says = feed(self.model.model, rest, cache)
            self.prompt_cache.insert_cache(tokens, cache, cache_type="user")
            self.prompt_cache.log_cache_stats()
            return len(tokens) - len(rest), says

        def cleanup(self):
            self.prompt_cache.close()

    put_modules(monkeypatch, app__handler__mlx_lm={"MLXLMHandler": MLXLMHandler})
    return MLXLMHandler


def put_vllm_mlx(monkeypatch):
    """Make a stand-in for vllm-mlx 4b654c0; return its simple engine."""

    class SimpleEngine:
        def __init__(self, model_name, prefix_trie_cache=False):
            self._model = mlx_lm.load(str(model_name))[0]
            self._prefix_trie_cache_enabled = prefix_trie_cache
            self._prefix_trie_cache_size = 32
            self._prefix_trie_cache = None
            self._prefix_trie_cache_lock = threading.Lock()

        def _ensure_prefix_trie_cache(self):
            if not self._prefix_trie_cache_enabled:
                return None
            if self._prefix_trie_cache is None:
                self._prefix_trie_cache = LRUPromptCache(max_size=32)
            return self._prefix_trie_cache

        @staticmethod
        def _peek_prefix_trie_tokens_saved(prefix_trie, model, tokens):
            return prefix_trie._trie.search(model, tokens).common_prefix

        def generate(self, tokens, system=0):
            """Return how many tokens were found, and what the model says next.

            With a snapshot of the system prompt of so many tokens, the trie is asked
            only for more.
            """
            trie = self._ensure_prefix_trie_cache()
            cache, rest = None, tokens
            peek = self._peek_prefix_trie_tokens_saved
            if not system or peek(trie, self._model, tokens) > system:
                cache, rest = trie.fetch_nearest_cache(self._model, tokens)
                if cache is not None and not rest:
                    trim_prompt_cache(cache, 1)
                    rest = tokens[-1:]
            cache = cache or make_prompt_cache(self._model)
            says = feed(self._model, rest, cache)
            trie.insert_cache(self._model, tokens, cache)
            return len(tokens) - len(rest), says

        async def stop(self):
            self._model = self._prefix_trie_cache = None

    put_modules(monkeypatch, vllm_mlx__engine__simple={"SimpleEngine": SimpleEngine})
    return SimpleEngine
