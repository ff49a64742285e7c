"""What the verbs are for, other names that people try for them, and examples."""

GROUPS = {
    "Keep, and go on": ("save", "generate", "chat", "serve", "demo"),
    "See what is there": ("ls", "show", "search", "inspect", "lookup", "stats", "view"),
    "Hand over": ("load", "export", "import", "key", "remote", "push", "pull", "adopt"),
    "Look after the store": (
        "init",
        "rename",
        "pin",
        "rm",
        "prune",
        "verify",
        "calibrate",
        "recompress",
        "doctor",
        "bench",
    ),
    "Help": ("dir", "completion", "help"),
}
# Where each verb is, so that one is started without the others.
MODULES = {
    name: module
    for module, names in {
        "generate": ("save", "generate"),
        "chat": ("chat",),
        "serve": ("serve",),
        "demo": ("demo", "bench"),
        "listing": ("ls",),
        "texts": ("show", "search"),
        "entries": ("inspect", "load", "rm", "adopt", "recompress"),
        "lookup": ("lookup",),
        "view": ("view",),
        "transfer": ("export", "import"),
        "keys": ("key",),
        "remote": ("remote", "push", "pull"),
        "init": ("init",),
        "calibrate": ("calibrate",),
        "doctor": ("doctor",),
        "housekeeping": (
            *("stats", "rename", "pin", "prune", "verify"),
            *("dir", "completion", "help"),
        ),
    }.items()
    for name in names
}
ALIASES = {
    "cat": "show",
    "delete": "rm",
    "del": "rm",
    "list": "ls",
    "mv": "rename",
    "remove": "rm",
    "run": "generate",
    "find": "search",
    "check": "verify",
}
EXAMPLES = {
    "save": ["kvstore save --model M --name handbook < handbook.txt"],
    "generate": [
        'kvstore generate --from handbook "Who may sign?"',
        'kvstore generate --name daily "And tomorrow?"',
        "git diff | kvstore generate --model M --max-tokens 300",
    ],
    "chat": [
        "kvstore chat --model M --name daily",
        "kvstore chat --name daily         # goes on, with the same model",
        "kvstore chat --from handbook      # the handbook stays as it is",
    ],
    "serve": [
        "kvstore serve --model M --port 8080 --log-format json",
        "kvstore serve --model M --remote team --push",
    ],
    "demo": ["kvstore demo --model M --num-tokens 1000"],
    "ls": ["kvstore ls --sort size", "kvstore ls --tree --named"],
    "show": ["kvstore show daily --tail"],
    "search": ["kvstore search treasurer"],
    "inspect": ["kvstore inspect handbook"],
    "lookup": ["kvstore lookup --model M --explain < prompt.txt"],
    "stats": ["kvstore stats --json"],
    "view": ["kvstore view", "kvstore view -o store.html"],
    "load": ["kvstore load handbook -o handbook.safetensors"],
    "export": ["kvstore export handbook -o handbook.kvbundle --sign"],
    "import": ["kvstore import handbook.kvbundle --from alice"],
    "key": ["kvstore key new", "kvstore key trust alice 64_HEX_DIGITS"],
    "remote": ["kvstore remote add team s3://bucket/prefix"],
    "push": ["kvstore push handbook"],
    "pull": ["kvstore pull handbook"],
    "adopt": ["kvstore adopt handbook --model M"],
    "init": ["kvstore init --encrypt --key-file ~/kvstore.key"],
    "rename": ["kvstore rename daily archive"],
    "pin": ["kvstore pin handbook", "kvstore pin handbook --off"],
    "rm": ["kvstore rm daily", "kvstore rm daily --purge -y"],
    "prune": ["kvstore prune --older-than 30d -n", "kvstore prune --limit 20GB"],
    "verify": ["kvstore verify --read-data=10%"],
    "calibrate": ["kvstore calibrate --model M", "kvstore calibrate --from-store"],
    "recompress": ["kvstore recompress handbook --quality small"],
    "doctor": ["kvstore doctor --model M"],
    "bench": ["kvstore bench --model M > report.md"],
    "completion": ['eval "$(kvstore completion)"'],
}
