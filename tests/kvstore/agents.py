"""Sessions of coding agents: what they send, turn by turn, as long as a server answers.

Each session is a generator of requests that is sent the replies, as a real client
sends them back. What a request has that no request before it had is told apart from
what merely stands elsewhere or is rendered anew. The same text comes out each time.
"""

import json
import random
from dataclasses import dataclass

NUM_TURNS = 30
TEMPLATE = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for message in messages -%}{%- if message.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    # As the templates of thinking models: of old replies, only what came after it.
    "{%- if message.role == 'assistant' and loop.index0 < ns.last -%}"
    "{{ (message.content or '').split('</think>')[-1] }}"
    "{%- else -%}"
    "{%- if message.reasoning -%}{{ '<think>' + message.reasoning + '</think>' }}"
    "{%- endif -%}{{ message.content or '' }}"
    "{%- endif -%}"
    "{%- for tool_call in message.tool_calls or [] -%}{# tool_call.name #}"
    "{{ '<tool_call>' + (tool_call.function | tojson) + '</tool_call>' }}"
    "{%- endfor -%}"
    "{%- if loop.first and tools -%}{{ '\nTools:\n' }}"
    "{%- for tool in tools -%}{{ (tool | tojson) + '\n' }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_NOUNS = ("parser", "index", "reader", "writer", "header", "cache", "token", "layer")
_VERBS = ("opens", "checks", "reads", "keeps", "moves", "drops", "counts", "splits")
TOOLS = ("read", "write", "search", "run", "browse", "list", "rename")
RULES = (
    "You are a coding agent that works in the user's repository. Use the tools to read"
    " and change files, and say in one line what you have done. Never invent files."
)


@dataclass(frozen=True)
class Request:
    """What a client posts, and what of it is new."""

    messages: list
    # Those of them that no request has had.
    new: list
    tools: list | None = None

    @property
    def body(self):
        """The part of it that the chat template is given."""
        tools = {"tools": self.tools} if self.tools else {}
        return {"messages": self.messages} | tools


def prose(seed, num_lines):
    """Return lines as a tool shows them of a file."""
    rng = random.Random(seed)
    words = ((rng.choice(_NOUNS), rng.choice(_VERBS)) for _ in range(num_lines))
    other = (rng.choice(_NOUNS) for _ in range(num_lines))
    return "\n".join(
        f"The {noun} {verb} the {last} in step {rng.randrange(100)}."
        for (noun, verb), last in zip(words, other, strict=True)
    )


def system(text="", *, before="", seed="rules", num_lines=130):
    """Return a system prompt: what changes stands before or behind the rules."""
    parts = [before, RULES, prose(seed, num_lines), text]
    return {"role": "system", "content": "\n".join(filter(None, parts))}


def user(turn, num_lines=3):
    """Return what the user says."""
    text = f"Task {turn}: look at this, and go on.\n{prose(f'user {turn}', num_lines)}"
    return {"role": "user", "content": text}


def result(turn, num_lines=6):
    """Return what a tool has answered."""
    return {"role": "tool", "content": prose(f"result {turn}", num_lines)}


def tool(name):
    """Return a tool as a client offers it."""
    path = {"type": "string", "description": f"What to {name}"}
    schema = {"type": "object", "properties": {"path": path}, "required": ["path"]}
    about = f"Have the agent {name} a file of the workspace."
    function = {"name": name, "description": about, "parameters": schema}
    return {"type": "function", "function": function}


def next_message(turn):
    """Return what follows a reply: results of tools, and now and then the user."""
    return user(turn) if turn % 5 == 0 else result(turn)


def turns(head_of, tools_of=lambda turn: None):
    """Play a conversation whose head is what a turn makes of it."""
    said = []
    for turn in range(NUM_TURNS):
        said.append(next_message(turn))
        head = [head_of(turn)]
        new = said[-1:] if turn else [*head, *said]
        said.append((yield Request([*head, *said], new, tools_of(turn))))


def clock():
    """The time of each request stands in front of all."""
    return turns(lambda t: system(before=f"Today is Monday, 23 March, 09:{t:02}:17."))


def git_status():
    """Branch and changed files stand behind the rules, as they are by then."""

    def head(turn):
        files = "".join(f"\n M src/{_NOUNS[n % 8]}.py" for n in range(turn % 4 + 1))
        return system(f"Branch: main, {turn // 3} commits ahead\nStatus:{files}")

    return turns(head)


def changing_tools():
    """Tools come and go with their servers, and so does the head."""

    def offered(turn):
        names = TOOLS[:5] if turn < 8 else TOOLS
        if turn >= 15:
            names = [name for name in names if name != "search"]
        if turn >= 23:  # the first is of a server that was slower this time
            names = [*names[1:], *names[:1]]
        return [tool(name) for name in names]

    return turns(lambda turn: system(), offered)


def stripped_thinking():
    """Reasoning is left out of all replies before the user's last message."""
    return turns(lambda turn: system())


def tool_calls():
    """Tool calls come back as objects, which the template spells its own way."""
    return turns(lambda turn: system(), lambda turn: [tool("look_up"), tool("read")])


def compaction():
    """Twice, a summary takes the place of all but the last messages."""
    head, said = system(), []
    for turn in range(NUM_TURNS):
        said.append(next_message(turn))
        new = said[-1:] if turn else [head, *said]
        if turn in (12, 23):
            # The client asks for it, at the end of all that was said.
            ask = {"role": "user", "content": "Sum up all that was done so far."}
            yield Request([head, *said, ask], [*new, ask])
            summary = f"What was done up to step {turn}:\n{prose(f'sum {turn}', 12)}"
            said = [{"role": "user", "content": summary}, *said[-5:]]
            new = said[:1]
        said.append((yield Request([head, *said], new)))


def sub_agents():
    """Every few turns a helper with a head of its own reads files for the agent."""
    main = turns(lambda turn: system())
    request = next(main)
    for turn in range(NUM_TURNS):
        if turn % 6 == 3:
            head = system(seed="helper", num_lines=60)
            said = [user(f"of a helper, {turn}")]
            for step in range(2):
                new = said[-1:] if step or turn > 3 else [head, *said]
                said.append((yield Request([head, *said], new)))
                said.append(result(f"of a helper, {turn} {step}"))
        reply = yield request
        try:
            request = main.send(reply)
        except StopIteration:
            return


def write_words(folder, num_words=1024):
    """Give a tiny model a tokenizer that has words, and the sessions' template.

    What such a model says of itself is spelled in other tokens by the tokenizer. Return
    the ids of those that are text whichever come next.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_words,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    offered = [json.dumps(tool(name)) for name in TOOLS]
    made.train_from_iterator([prose("words", 400), RULES, *offered], trainer)
    made.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    words = {made.decode([number]): number for number in made.get_vocab().values()}
    return sorted(n for w, n in words.items() if w and w.isascii() and w.isprintable())


EXACT = (stripped_thinking, tool_calls, compaction, sub_agents)
"""Sessions that need nothing but what was sampled, and where conversations part."""
NEAR = (clock, git_status, changing_tools)
"""Sessions whose head changes."""


@dataclass(frozen=True)
class Turn:
    """What became of a request."""

    num_tokens: int
    # Those of its new messages, with the marks around them.
    num_new: int
    num_computed: int
    num_moved: int


def as_message(answer):
    """Return a server's answer as a client sends it back."""
    found = answer.choices[0].message.model_dump(exclude_none=True)
    kept = ("role", "content", "reasoning", "tool_calls")
    return {key: found[key] for key in kept if key in found}


def requests_of(session, reply="Done."):
    """Yield the requests of a session whose model always says the same."""
    requests, message = session(), {"role": "assistant", "content": reply}
    request = next(requests)
    while request is not None:
        yield request
        try:
            request = requests.send(message)
        except StopIteration:
            request = None


def play(session, ask, count, after=lambda number: None):
    """Hold a session; return what became of each request.

    Args:
        session: One of those above.
        ask: Given a request, returns the reply as a message, and the answer's usage.
        count: Returns how many tokens messages are, with what opens a reply.
        after: Called with the number of each request that was answered.
    """
    requests, found = session(), []
    request = next(requests)
    while True:
        reply, usage = ask(request)
        mine = usage.kvstore
        found.append(
            Turn(
                usage.prompt_tokens,
                count(request.new),
                mine["computed_tokens"],
                mine["reanchored_tokens"],
            )
        )
        after(len(found))
        try:
            request = requests.send(reply)
        except StopIteration:
            return found


def share_beyond(found):
    """Return which part of all prompts was computed though it was not new."""
    beyond = sum(max(0, turn.num_computed - turn.num_new) for turn in found)
    return beyond / sum(turn.num_tokens for turn in found)
