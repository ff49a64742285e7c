"""A team's store that may only be read, under one's own.

What the team has read (its handbook, its code) is on a share or a snapshot; what I add
goes to my own store. Usage: python team_base.py MODEL TEAM_STORE "my prompt" ...
"""

import sys

from kvstore.blas import load_openblas

load_openblas()

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import kvstore
from kvstore.models import load_models


def main(model: str, team_path: str, *prompts: str) -> None:
    """Compute each prompt from the better of both stores, and keep it in mine."""
    loaded = load_models(model)
    stores = [kvstore.Store(), kvstore.Store(team_path, create=False)]
    mine = stores[0]
    for prompt in prompts:
        tokens = loaded.tokenizer.encode(prompt)
        held = [s.lookup(tokens, loaded.fingerprint).num_tokens for s in stores]
        # Mine where both have as much.
        better = stores[held.index(max(held))]
        prompt_cache, rest = better.load(tokens, loaded.fingerprint)
        where = "mine" if better is mine else "the team's"
        print(f"{len(tokens)} tokens, {len(tokens) - len(rest)} from {where}")
        prompt_cache = prompt_cache or make_prompt_cache(loaded.model)
        mx.eval(loaded.model(mx.array([rest]), cache=prompt_cache))
        mine.save(tokens, prompt_cache, loaded.fingerprint)
    for store in stores:
        store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
