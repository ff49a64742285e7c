"""A LiteLLM callback that keeps what changes out of the front of an agent's prompts.

A store finds a prompt again by how it begins. So lines of the system prompt that are
new in each request are left out, and tools come in the order of their names. Keep it
beside `litellm.yaml`, which names it.
"""

import re
from typing import Any

try:
    from litellm.integrations.custom_logger import CustomLogger
except ImportError:  # so that the functions can be used, and tested, without it
    CustomLogger = object

# Whole lines. `kvstore lookup --request FILE.json --explain` shows what else differs
# in yours; a line of which the model must know is better put into the last message.
VOLATILE = re.compile(
    r"^[ \t]*(?:x-anthropic-billing-header|current time|session id|request id)\b.*\n?",
    re.IGNORECASE | re.MULTILINE,
)


def make_stable(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request, of either API, with a front that stays the same."""
    found = dict(request)
    if request.get("tools"):
        found["tools"] = sorted(request["tools"], key=tool_name)
    if request.get("system"):
        found["system"] = without_volatile(request["system"])
    if isinstance(request.get("messages"), list):
        found["messages"] = [
            message | {"content": without_volatile(message.get("content"))}
            if message.get("role") in ("system", "developer")
            else message
            for message in request["messages"]
        ]
    return found


def without_volatile(content: Any) -> Any:
    """Return a text, or a list of blocks of text, without the lines that change."""
    if isinstance(content, str):
        return VOLATILE.sub("", content)
    if not isinstance(content, list):
        return content
    blocks = [
        block | {"text": VOLATILE.sub("", block["text"])} if "text" in block else block
        for block in content
    ]
    return [block for block in blocks if block.get("text") != ""]


def tool_name(tool: dict[str, Any]) -> str:
    """Return the name of a tool, of either API."""
    return str(tool.get("function", tool).get("name", ""))


class StablePrompt(CustomLogger):
    """What LiteLLM's proxy calls before each request."""

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Return the request to send."""
        return make_stable(data)


stable_prompt = StablePrompt()
