"""Hold sessions of coding agents with a real model behind `kvstore serve`.

    python tools/agents.py .cache/smollm2
    python tools/agents.py .cache/smollm2 --sessions clock git_status

The sessions are those of `tests/kvstore/agents.py`: 30 turns each, the replies are the
model's, and in the middle the server is killed and started again. Where the head of the
prompt changes, it is started with `--reanchor`. What is printed of each session: how
many tokens its prompts had, how many of them were new, how many were computed, which
part of all was computed though it was not new, and how many were re-anchored.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kit import load_beside  # noqa: E402

agents, beside = load_beside("agents"), load_beside("servers")


def with_template(model, folder):
    """Return a folder with a model and the sessions' template."""
    folder.mkdir()
    for path in Path(model).resolve().iterdir():
        (folder / path.name).symlink_to(path)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"chat_template": agents.TEMPLATE}
    config.unlink()
    config.write_text(json.dumps(settings))
    return folder


class Session:
    """A session with a server of its own.

    Args:
        folder: For its store and its log.
        model: The folder of the model.
        words: Options of `serve`.
    """

    def __init__(self, folder, model, words):
        self._servers = beside.Servers(folder / "home")
        self._start = partial(self._servers.kvstore, folder / "store", model, *words)
        self._server = self._start()

    def ask(self, request):
        """Return the reply to a request, and its usage."""
        tools = {"tools": request.tools} if request.tools else {}
        answer = self._server.ask(request.messages, max_tokens=24, **tools)
        return agents.as_message(answer), answer.usage

    def after(self, number):
        """Wait as long as a tool takes; in the middle, kill the server."""
        time.sleep(0.5)
        if number == agents.NUM_TURNS // 2:
            self._server.stop(signal.SIGKILL)
            self._server = self._start()

    def close(self):
        """End the server."""
        self._servers.close()


def hold(name, model, count):
    """Hold a session, and return what became of each request."""
    session = getattr(agents, name)
    words = ["--reanchor"] if session in agents.NEAR else []
    folder = Path(tempfile.mkdtemp())
    held = Session(folder, model, words)
    try:
        return agents.play(session, held.ask, count, held.after)
    finally:
        held.close()
        shutil.rmtree(folder)


def main():
    """Hold the sessions, and print a line for each."""
    from mlx_lm.utils import load_tokenizer

    from kvstore.server.requests import encode_request

    known = [session.__name__ for session in (*agents.EXACT, *agents.NEAR)]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--sessions", nargs="+", choices=known, default=known)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    model = with_template(options.model, folder / "model")
    tokenizer = load_tokenizer(model)

    def count(messages):
        return len(encode_request(tokenizer, {"messages": messages}))

    print("| session | requests | tokens | new | computed | beyond | re-anchored |")
    print("|---|---|---|---|---|---|---|")
    for name in options.sessions:
        found = hold(name, model, count)
        sums = [
            sum(getattr(turn, field) for turn in found)
            for field in ("num_tokens", "num_new", "num_computed", "num_moved")
        ]
        tokens, new, computed, moved = (f"{total:,}" for total in sums)
        beyond = f"{agents.share_beyond(found):.2%}"
        row = (name, len(found), tokens, new, computed, beyond, moved)
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
