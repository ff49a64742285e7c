"""Models with states, windows and lists of caches are served as well as plain ones."""

import importlib.util
import json
import shutil

import mlx.core as mx
import pytest
from kit import load_beside
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList

import kvstore
from kvstore.format.entry import Entry
from kvstore.server import provider
from kvstore.server.generator import Batch
from kvstore.server.writer import dispensable

architectures, beside = load_beside("architectures"), load_beside("servers")

LISTS = sorted(provider._LISTS_BATCHED_RIGHT)
RECURRENT = (
    "bailing_moe_linear", "granitemoehybrid", "jamba", "kimi_linear",
    "lfm2", "mamba", "mamba2", "nemotron_h", "plamo2", "qwen3_5", "qwen3_next",
    "recurrent_gemma", "rwkv7",
)  # fmt: skip
# Each takes seconds; the others run with the slow tests.
QUICK = {"mamba", "qwen3_next", "nemotron_h", "deepseek_v32"}
PROMPTS = [[(7 * i + 13 * n) % 100 + 3 for i in range(9 + 17 * n)] for n in range(4)]


def run(model, prompts, *, is_staggered=False):
    """Generate in a batch as `serve` does; return tokens and caches of each prompt."""
    batch = Batch(
        lambda *_: None,
        lambda *_: None,
        model,
        prefill_step_size=64,
        completion_batch_size=8,
    )
    waiting, numbers, tokens, ends = list(enumerate(prompts)), {}, {}, {}
    num_steps = 0
    while len(ends) < len(prompts):
        if waiting and (not is_staggered or num_steps % 3 == 0):
            number, prompt = waiting.pop(0)
            cut = len(prompt) // 3
            (uid,) = batch.insert_segments(
                segments=[[prompt[:cut], prompt[cut:]]],
                max_tokens=[10],
                caches=[None],
                all_tokens=[[]],
            )
            numbers[uid], tokens[number] = number, []
            if not is_staggered:
                continue
        for response in batch.next()[1]:
            number = numbers[response.uid]
            tokens[number].append(response.token)
            if response.finish_reason:
                ends[number] = (list(response.all_tokens), response.prompt_cache)
        num_steps += 1
    assert batch._begun == {}  # a server that runs for weeks remembers no request
    return tokens, ends


def states(prompt_cache):
    """Yield all states of a prompt cache."""
    for cache in prompt_cache:
        if isinstance(cache, CacheList):
            yield from states(cache.caches)
        elif isinstance(cache, ArraysCache):
            yield from (state for state in cache.cache if isinstance(state, mx.array))


@pytest.mark.parametrize("is_staggered", [False, True], ids=["together", "staggered"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in (*RECURRENT, *LISTS)
    ],
)
def test_a_batch_computes_what_each_prompt_computes_alone(name, is_staggered):
    """Tokens, states, and what comes next are the same in company."""
    if importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        pytest.skip("this release of mlx-lm has no such architecture")
    model = architectures.make_model(name)
    assert provider._is_batched_right(model)
    said, ends = run(model, PROMPTS, is_staggered=is_staggered)
    for number, prompt in enumerate(PROMPTS):
        expected, alone = run(model, [prompt])
        assert said[number] == expected[0]
        (fed, cache), (fed_alone, cache_alone) = ends[number], alone[0]
        assert fed == fed_alone
        for mine, other in zip(states(cache), states(cache_alone), strict=True):
            assert mine.shape == other.shape
            assert mx.allclose(mine, other, rtol=1e-4, atol=1e-4).item()
        mine = architectures.feed(model, cache, [65])
        other = architectures.feed(model, cache_alone, [65])
        assert mx.allclose(mine, other, rtol=1e-3, atol=1e-3).item()


def test_a_list_that_was_not_measured_is_served_alone():
    """A batch of minimax_m3_vl says something else than its prompts alone."""
    name = "minimax_m3_vl"
    if importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        pytest.skip("this release of mlx-lm has no such architecture")
    assert not provider._is_batched_right(architectures.make_model(name))


def write_folder(name, tiny_model, folder):
    """Write a model with random weights and the tiny model's tokenizer."""
    sizes = {"vocab_size": 260}
    model = architectures.make_model(name, **sizes)
    shutil.copytree(tiny_model, folder)
    config = architectures.arguments(name) | sizes | {"eos_token_id": 257}
    config.pop("layer_types", None)  # which transformers does not take for all
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


# The model's own answers are no text that comes back as the same tokens.
LETTERS = {str(token): 100 for token in range(64, 90)}
RULES = "Answer in one word, and never twice in the same way. " * 12


def talk(server, messages):
    """Hold a conversation of four turns; return for each what was held and said."""
    found = []
    for turn in range(4):
        messages.append({"role": "user", "content": f"And what of {turn}? " * 12})
        answer = server.ask(messages, logit_bias=LETTERS)
        found.append((beside.cached(answer), beside.said(answer)))
        messages.append({"role": "assistant", "content": found[-1][1]})
    return found


@pytest.fixture
def servers(tmp_path):
    """Starts servers of one test."""
    started = beside.Servers(tmp_path / "home")
    yield started
    started.close()


@pytest.mark.parametrize(
    "name",
    [
        "mamba",
        pytest.param("gemma3_text", marks=pytest.mark.slow),
        pytest.param("deepseek_v32", marks=pytest.mark.slow),
        pytest.param("falcon_h1", marks=pytest.mark.slow),
        pytest.param("recurrent_gemma", marks=pytest.mark.slow),
    ],
)
def test_a_session_holds_what_the_stock_server_holds(
    servers, tiny_model, tmp_path, name
):
    """Turns, another chat under the same rules, and both again after a restart."""
    folder = write_folder(name, tiny_model, tmp_path / name)
    store = tmp_path / "store"
    ours = servers.kvstore(store, folder, "--codec", "planes+zstd", "--min-tokens", "1")
    stock = servers.stock(folder)
    rules = {"role": "system", "content": RULES}
    mine, theirs = [rules], [rules]
    for _ in range(2):
        held, expected = talk(ours, mine), talk(stock, theirs)
        assert [said for _, said in held] == [said for _, said in expected]
        for (mine_held, _), (stock_held, _) in zip(held, expected, strict=True):
            assert mine_held >= stock_held
        last = mine
        mine, theirs = [rules], [rules]
    question = {"role": "user", "content": "And in the end?"}
    before = beside.cached(ours.ask([*last, question], logit_bias=LETTERS))
    ours.stop()
    ours = servers.kvstore(store, folder, "--codec", "planes+zstd", "--min-tokens", "1")
    after = beside.cached(ours.ask([*last, question], logit_bias=LETTERS))
    # The same request: all but its last token is on disk now.
    assert after >= before > len(RULES)
    other = [rules, {"role": "user", "content": "A third chat begins here. " * 9}]
    assert beside.cached(ours.ask(other, logit_bias=LETTERS)) > len(RULES) * 0.9


def entry_of(num_tokens):
    """Return an entry of so many tokens."""
    return Entry(
        f"{num_tokens:032x}", None, "", "", num_tokens, 0, "raw", "", {}, 0.0, 0.0
    )


def test_ends_that_nobody_goes_back_to_are_dispensable():
    """The newest stay, and before them one at about each half of the length."""
    kept = []
    for turn in range(1, 201):
        kept.append(entry_of(100 * turn))
        gone = dispensable(kept)
        kept = [entry for entry in kept if entry not in gone]
        assert [e.num_tokens for e in kept][-4:] == [
            100 * n for n in range(max(1, turn - 3), turn + 1)
        ]
    assert len(kept) <= 12
    assert min(entry.num_tokens for entry in kept) <= 400


@pytest.mark.slow
def test_a_long_chat_of_a_recurrent_model_keeps_a_handful_of_states(
    servers, tiny_model, tmp_path
):
    """After 30 turns, the store has few entries, and still goes on at the last."""
    folder = write_folder("mamba", tiny_model, tmp_path / "mamba")
    store = tmp_path / "store"
    server = servers.kvstore(store, folder, "--codec", "raw", "--min-tokens", "1")
    messages = []
    for turn in range(30):
        messages.append({"role": "user", "content": f"And what of {turn}?"})
        answer = server.ask(messages, logit_bias=LETTERS, max_tokens=3)
        messages.append({"role": "assistant", "content": beside.said(answer)})
    server.stop()
    with kvstore.Store(store, create=False) as opened:
        assert len(opened.entries()) <= 16
    server = servers.kvstore(store, folder, "--codec", "raw", "--min-tokens", "1")
    messages.append({"role": "user", "content": "And then?"})
    answer = server.ask(messages, logit_bias=LETTERS, max_tokens=3)
    assert beside.cached(answer) > 0.8 * answer.usage.prompt_tokens
