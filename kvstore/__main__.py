"""``python -m kvstore`` is the command ``kvstore``."""

from .cli import main

main()
