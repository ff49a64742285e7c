"""Read a document once; ask it in any process, any number of times.

Usage: python shared_handbook.py MODEL handbook.txt "Who may sign?" ...
"""

import sys
from pathlib import Path

from kvstore.blas import load_openblas

load_openblas()  # before MLX, where MLX brings only a slow one

import kvstore
from kvstore.models import SamplingOptions, continue_entry, load_models


def main(model: str, document: str, *questions: str) -> None:
    """Keep the document under its name, and print an answer to each question."""
    loaded, name = load_models(model), Path(document).stem
    with kvstore.Store() as store:
        if name not in store:
            tokens = loaded.tokenizer.encode(Path(document).read_text())
            kvstore.save_prompt(loaded, tokens, store=store, name=name)
        for question in questions:
            prompt = continue_entry(loaded, store, name, question)
            # `keep=False`: no question changes the document, or sees another one.
            for response in kvstore.stream_generate(
                loaded,
                prompt,
                store=store,
                keep=False,
                sampling=SamplingOptions(max_tokens=40),
            ):
                print(response.text, end="")
            print()


if __name__ == "__main__":
    main(*sys.argv[1:])
