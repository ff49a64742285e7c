"""Turns are found in the tokens of a conversation, whatever template made them."""

import pytest

from kvstore.errors import KVStoreError
from kvstore.models.templates import Template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief<|im_end|>\n"
    "{% endif %}" + CHATML
)
THINKING = (
    CHATML.removesuffix("{% endif %}")
    + "{% if quiet %}<think></think>{% endif %}{% endif %}"
)
HEADERS = (
    "<|begin|>{% if messages[0]['role'] != 'system' %}"
    "<|head|>system<|/head|>\n\nToday: {{ day or '1 May' }}\n\n<|eot|>{% endif %}"
    "{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
    "{% if m['role'] == 'system' %}Today: {{ day or '1 May' }}\n\n{% endif %}"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
# The system's words are put into the first message.
FOLDED = (
    "<bos>{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.s = m['content'] + '\n\n' %}{% else %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{% if m['role'] == 'user' %}{{ ns.s }}{% set ns.s = '' %}{% endif %}"
    "{{ m['content'] | trim }}</turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
BRACKETS = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    " [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ '### Ask:\n' if m['role'] == 'user' else '### Say:\n' }}"
    "{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Say:\n{% endif %}"
)

FAMILIES = {
    # Template, special tokens, tokens that end a reply, whether words bear their space.
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"], False),
    "default system": (
        DEFAULT_SYSTEM,
        ["<|im_start|>", "<|im_end|>"],
        ["<|im_end|>"],
        False,
    ),
    "another end": (
        CHATML,
        ["<|im_start|>", "<|im_end|>", "<|end|>"],
        ["<|end|>", "<|im_end|>"],
        False,
    ),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"], False),
    "headers": (
        HEADERS,
        ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"],
        ["<|eot|>"],
        False,
    ),
    "folded": (FOLDED, ["<bos>", "<turn>", "</turn>", "<eos>"], ["<eos>"], False),
    "brackets": (BRACKETS, ["<s>", "</s>", "[INST]", "[/INST]"], ["</s>"], False),
    "brackets as text": (BRACKETS, ["<s>", "</s>"], ["</s>"], True),
}


def make_tokenizer(template, specials, ends, has_spaces=False):
    """Return a tokenizer of letters, or bytes, as mlx-lm wraps one."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if has_spaces:
        letters = [chr(i) for i in range(33, 256) if chr(i).isprintable()]
        pieces = ["▁", "\n", *letters, "▁a", "▁[", "▁x", "]▁", "IN", "ST", "INST"]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        merges = [("▁", "a"), ("▁", "["), ("▁", "x"), ("I", "N"), ("S", "T")]
        model = models.BPE(vocabulary, [*merges, ("IN", "ST")])
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        # Two line ends in a row are one token, as in real vocabularies.
        vocabulary = {c: i for i, c in enumerate([*alphabet, "ĊĊ"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in specials])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=ends[0], chat_template=template
    )
    return TokenizerWrapper(whole, eos_token_ids=whole.convert_tokens_to_ids(ends))


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    """A tokenizer of each family of templates."""
    return make_tokenizer(*FAMILIES[request.param])


def plain(tokenizer, text):
    """Return the tokens of a text by itself."""
    return list(tokenizer.encode(text, add_special_tokens=False))


SAID = ["Hello", "\nand a line", " x", "7", "é?\n\n", "[x]"]


def converse(tokenizer, end, *, system_prompt=None):
    """Return the tokens of a conversation, and where its turns end."""
    tokens, ends = [], []
    for words in SAID:
        tokens += (
            Template(tokenizer).encode_next(words, tokens, is_literal=True)
            if tokens
            else Template(tokenizer).encode_prompt(
                words, system_prompt, is_literal=True
            )
        )
        tokens += [*plain(tokenizer, f"to {words}."), *end]
        ends.append(len(tokens))
    return tokens, ends


def test_turns_are_found(tokenizer):
    """Where the model closed its replies itself, turns begin where they ended."""
    end = [min(tokenizer.eos_token_ids)]
    tokens, ends = converse(tokenizer, end)
    first, *later = Template(tokenizer).marks.begins(tokens)
    assert later == ends[:-1]
    assert "Hello" not in tokenizer.decode(tokens[:first])
    assert tokenizer.decode(tokens[first:]).count("Hello") == 2


@pytest.mark.parametrize("family", [f for f in FAMILIES if "brackets" not in f])
def test_a_system_prompt_is_no_turn(family):
    """What the system says stands before the first turn, or in its message."""
    tokenizer = make_tokenizer(*FAMILIES[family])
    tokens, _ = converse(tokenizer, [], system_prompt="Be kind")
    begins = Template(tokenizer).marks.begins(tokens)
    assert len(begins) == len(SAID)
    is_before = "Be kind" in tokenizer.decode(tokens[: begins[0]])
    assert is_before == (family != "folded")


def test_replies_that_were_cut_off_are_turns_too(tokenizer):
    """Where the template closed a reply, it is closed once more at most."""
    tokens, _ = converse(tokenizer, [])
    begins = Template(tokenizer).marks.begins(tokens)
    assert len(begins) == len(SAID)
    for begin, words in zip(begins[1:], SAID[1:], strict=True):
        again = Template(tokenizer).encode_next(words, tokens[:begin], is_literal=True)
        assert tokens[begin:][: len(again)] == again


def test_what_was_said_last_is_found(tokenizer):
    """The last exchange is what the user said and what was replied."""
    tokens, _ = converse(tokenizer, [])
    marks = Template(tokenizer).marks
    asked, replied = marks.exchange(tokens, marks.begins(tokens)[-1])
    assert tokenizer.decode(asked).strip() == "[x]"
    assert tokenizer.decode(replied).strip() == "to [x]."


def test_a_message_forges_no_turn(tokenizer):
    """A message with the text of the marks in it is a message."""
    forged = "".join(
        tokenizer.decode(Template(tokenizer).encode_next("one", [1, 2, 3]))
        for _ in range(2)
    )
    forged += encode_prompt_text(tokenizer)
    tokens = Template(tokenizer).encode_prompt(forged, is_literal=True)
    tokens += [*plain(tokenizer, "Yes."), min(tokenizer.eos_token_ids)]
    tokens += Template(tokenizer).encode_next(forged, tokens, is_literal=True)
    tokens += plain(tokenizer, "Yes.")
    assert len(Template(tokenizer).marks.begins(tokens)) == 2


def encode_prompt_text(tokenizer):
    """Return the text of a conversation of two turns, as its template renders it."""
    messages = [
        {"role": role, "content": "x"} for role in ("user", "assistant", "user")
    ]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("family", ["chatml", "default system", "headers"])
def test_a_first_message_follows_the_system(family):
    """Where all turns were taken back, the next message is a message of its own."""
    tokenizer = make_tokenizer(*FAMILIES[family])
    whole = Template(tokenizer).encode_prompt("Hello", "Be kind")
    system = whole[: Template(tokenizer).marks.first(whole)]
    assert "Be kind" in tokenizer.decode(system)
    assert [*system, *Template(tokenizer).encode_next("Hello", system)] == whole


def test_other_conversations_go_on_as_ever(tokenizer):
    """Turns, open messages and plain text are gone on with as without this."""
    turns, _ = converse(tokenizer, [])
    opened = Template(tokenizer).encode_prompt("A document", is_open=True)
    for tokens in (turns, opened, plain(tokenizer, "[x] a"), [turns[0], *turns[5:9]]):
        expected = Template(tokenizer)._continue("Hello", tokens)
        assert Template(tokenizer).encode_next("Hello", tokens) == expected


def test_a_template_of_plain_text_has_no_marks():
    """Where a message could contain what marks a turn, turns are not guessed."""
    tokenizer = make_tokenizer(BARE, ["</s>"], ["</s>"])
    with pytest.raises(KVStoreError, match="cannot be told apart"):
        _ = Template(tokenizer).marks


def test_a_template_that_shows_no_words_has_no_marks():
    """Where the template leaves out what is said, that is an error with a hint."""
    tokenizer = make_tokenizer("<s>nothing</s>", ["<s>", "</s>"], ["</s>"])
    with pytest.raises(KVStoreError) as caught:
        _ = Template(tokenizer).marks
    assert caught.value.hint


@pytest.mark.parametrize("family", ["chatml", "headers", "folded", "thinking"])
def test_a_system_prompt_is_known_again(family):
    """A conversation tells the system prompt that it was begun with from others."""
    tokenizer = make_tokenizer(*FAMILIES[family])
    tokens, _ = converse(tokenizer, [], system_prompt="Be kind")
    first = Template(tokenizer).marks.begins(tokens)[0]
    for held in (tokens, tokens[:first]) if family != "folded" else (tokens,):
        assert Template(tokenizer).begins_with(held, "Be kind")
        for other in ("Be", "kind", "Be kind!", "Be unkind", ""):
            assert not Template(tokenizer).begins_with(held, other)
    bare, _ = converse(tokenizer, [])
    assert not Template(tokenizer).begins_with(bare, "Be kind")


def test_a_system_prompt_is_known_on_another_day():
    """The date that a template writes before the system prompt does not count."""
    tokenizer = make_tokenizer(*FAMILIES["headers"])
    tokens, _ = converse(tokenizer, [], system_prompt="Be kind")
    config = {"day": "12 December"}
    assert Template(tokenizer, config).begins_with(tokens, "Be kind")
    for other in ("Be", "kind", "Be kind!"):
        assert not Template(tokenizer, config).begins_with(tokens, other)
