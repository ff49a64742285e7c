"""An agent whose long system prompt and history are never computed twice.

Each round starts from the longest prefix on disk, also when the program is started
again. Usage: python agent.py MODEL "first task" "second task" ...
"""

import sys

from kvstore.blas import load_openblas

load_openblas()

from mlx_lm import load, stream_generate
from mlx_lm.models.cache import make_prompt_cache

import kvstore

SYSTEM = "You are an agent. You may call the tools below.\n" + "\n".join(
    f"tool_{number}(path): reads page {number} of the file." for number in range(40)
)


def main(path: str, *tasks: str) -> None:
    """Do each task with the same instructions, and say what was reused."""
    model, tokenizer = load(path)
    tier = kvstore.tier(model, model_path=path)
    try:
        for task in tasks:
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": task},
            ]
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            prompt_cache, rest = tier.fetch(tokens)
            print(f"{len(tokens)} tokens, {len(tokens) - len(rest)} from disk")
            prompt_cache = prompt_cache or make_prompt_cache(model)
            said = []
            for response in stream_generate(
                model, tokenizer, rest, max_tokens=20, prompt_cache=prompt_cache
            ):
                said.append(response.token)
                print(response.text, end="")
            print()
            # The last token was said, and not yet fed.
            tier.put(tokens + said[:-1], prompt_cache)
            tier.flush()
    finally:
        tier.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
