"""What the verbs are for, other names that people try for them, and examples."""

GROUPS = {
    "Keep, and go on": ("save", "generate", "chat", "serve", "demo"),
    "See what is there": ("ls", "show", "search", "inspect", "lookup", "stats"),
    "Hand over": ("load", "export", "import", "remote", "push", "pull"),
    "Look after the store": ("rename", "pin", "rm", "prune", "verify", "doctor"),
    "Help": ("dir", "completion", "help"),
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
    "serve": ["kvstore serve --model M --port 8080 --log-format json"],
    "demo": ["kvstore demo --model M --num-tokens 1000"],
    "ls": ["kvstore ls --sort size", "kvstore ls --tree --named"],
    "show": ["kvstore show daily --tail"],
    "search": ["kvstore search treasurer"],
    "inspect": ["kvstore inspect handbook"],
    "lookup": ["kvstore lookup --model M --explain < prompt.txt"],
    "stats": ["kvstore stats --json"],
    "load": ["kvstore load handbook -o handbook.safetensors"],
    "export": ["kvstore export handbook -o handbook.kvbundle"],
    "import": ["kvstore import handbook.kvbundle --name manual"],
    "remote": ["kvstore remote add team s3://bucket/prefix"],
    "push": ["kvstore push handbook"],
    "pull": ["kvstore pull handbook"],
    "rename": ["kvstore rename daily archive"],
    "pin": ["kvstore pin handbook", "kvstore pin handbook --off"],
    "rm": ["kvstore rm daily", "kvstore rm daily --purge -y"],
    "prune": ["kvstore prune --older-than 30d -n", "kvstore prune --limit 20GB"],
    "verify": ["kvstore verify --read-data=10%"],
    "doctor": ["kvstore doctor --model M"],
    "completion": ['eval "$(kvstore completion)"'],
}
