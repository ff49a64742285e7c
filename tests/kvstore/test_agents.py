"""Sessions of coding agents, 30 turns each: what is computed that was computed before.

Nothing is said beforehand: each reply is what the server answers, and it comes back as
a client sends it. In the middle the server is killed, and started again.
"""

import signal
import time

import pytest
from conftest import write_model
from kit import load_beside
from mlx_lm.utils import load_tokenizer

from kvstore.server.requests import encode_request

agents, beside = load_beside("agents"), load_beside("servers")
THOUGHTS = tuple(f" thought {number}," for number in range(12))
# Said by the model in tokens that the text of a call is never encoded as.
CHAINS = {
    "stripped_thinking": ("<think>", *THOUGHTS, "</think>", *beside.CALL),
    "tool_calls": beside.CALL,
}


@pytest.fixture
def model(request, tiny_model, tmp_path):
    """A model for a session, and what its answers are made of."""
    name, folder = request.node.callspec.params["name"], tmp_path / "model"
    if name in CHAINS:
        beside.write_tool_model(folder, tiny_model, CHAINS[name], agents.TEMPLATE)
        return folder, {}
    write_model(folder, vocab_size=1024, eos_token_id=1)
    words = agents.write_words(folder)
    return folder, {"logit_bias": dict.fromkeys(map(str, words), 100)}


@pytest.fixture
def play(model, tmp_path):
    """A function that plays a session, with a kill in the middle."""
    folder, options = model
    servers = beside.Servers(tmp_path / "home")
    tokenizer = load_tokenizer(folder)

    def count(messages):
        return len(encode_request(tokenizer, {"messages": messages}))

    def run(name, *words):
        def start():
            return servers.kvstore(tmp_path / "store", folder, *words)

        server = start()

        def ask(request):
            given = options | ({"tools": request.tools} if request.tools else {})
            answer = server.ask(request.messages, max_tokens=24, **given)
            return agents.as_message(answer), answer.usage

        def after(number):
            nonlocal server
            time.sleep(0.2)  # as a tool takes
            if number == agents.NUM_TURNS // 2:
                server.stop(signal.SIGKILL)
                server = start()

        return agents.play(getattr(agents, name), ask, count, after)

    yield run
    servers.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", [session.__name__ for session in agents.EXACT])
def test_only_what_is_new_is_computed(play, name):
    """Where replies are rendered anew, or conversations part, nearly all is found."""
    found = play(name)
    assert agents.share_beyond(found) < 0.05
    assert not any(turn.num_moved for turn in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [session.__name__ for session in agents.NEAR])
def test_a_head_that_changes_costs_what_has_changed(play, name):
    """With `--reanchor`: the change, and the few tokens behind it."""
    found = play(name, "--reanchor")
    assert agents.share_beyond(found) < 0.02
    assert any(turn.num_moved for turn in found)


def test_a_session_is_the_same_each_time():
    """And as long as it says; what is new of it is at the end, or a head."""
    for session in (*agents.EXACT, *agents.NEAR):
        both = [list(agents.requests_of(session)) for _ in range(2)]
        assert both[0] == both[1]
        assert len(both[0]) >= agents.NUM_TURNS
        for request in both[0]:
            assert all(message in request.messages for message in request.new)
