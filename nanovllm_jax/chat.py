"""From a conversation to a prompt, through the tokenizer's chat template."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from nanovllm_jax.engine.prompts import Prompt, encode
from nanovllm_jax.values import check_switch

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")  # that Qwen3's template knows
OWN_ARGUMENTS = ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length")
OWN_ARGUMENTS += ("padding", "return_dict", "return_tensors", "tokenize", "tools", "truncation")


def chat_prompt(
    tokenizer: Any | None,
    messages: list[Message],
    *,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
) -> Prompt:
    """The prompt of one conversation, for `generate`, `stream` and `add_request`.

    messages: {"role": ..., "content": ...} each; `content` may be missing or None, as beside tool_calls, whose
    arguments may also be JSON, as OpenAI's clients send them.
    tools: JSON schemas or Python functions, as transformers takes them. chat_template_kwargs: what else the template
    knows, such as Qwen3's enable_thinking. add_generation_prompt: open the assistant's turn. continue_final_message:
    without that, leave the last message open, to be continued. chat_template: in place of the tokenizer's.
    Raises TypeError or ValueError for messages that are none or that the template refuses.
    """
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so no chat: give token ids to generate()")
    if not (chat_template or getattr(tokenizer, "chat_template", None)):
        raise ValueError("the checkpoint's tokenizer has no chat template: write the prompt yourself, for generate()")
    _check_messages(messages)
    options = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(options, Mapping):
        raise TypeError(f"chat_template_kwargs must be a dict or None, not {options!r}")
    for name in OWN_ARGUMENTS:
        if name in options:
            raise ValueError(f"chat_template_kwargs must not have {name!r}, which is not the template's to decide")
    own = dict(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
    for name, value in own.items():
        check_switch(name, value)
    if not isinstance(chat_template, str | None):
        raise TypeError(f"chat_template must be a string or None, not {chat_template!r}")
    messages = [_with_objects(message) for message in messages]

    def prompt_of(messages: list[Message]) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=chat_template, tokenize=False, **own, **options
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the chat template refuses the messages or their options: {error}") from error

    text = prompt_of(messages)
    if chat_template is None:
        _check_all_are_in(text, messages, prompt_of)
    # The template has written the special tokens.
    return {"prompt": text, "prompt_token_ids": encode(tokenizer, text, add_special_tokens=False)}


def _check_messages(messages: list[Message]) -> None:
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"a conversation must be a list of messages, not {messages!r}")
    if not messages:
        raise ValueError("a conversation must have at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {i} must be a dict with 'role' and 'content', not {message!r}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} must have a 'role' that is a string: {message!r}")
        content = message.get("content")
        if content is not None and not isinstance(content, str):  # templates leave out what is no text
            raise TypeError(f"message {i} must have a 'content' that is a string, not {content!r}")


def _check_all_are_in(text: str, messages: list[Message], prompt_of: Callable) -> None:
    """Raise ValueError where the template leaves out a role: what it would say is put in place of what it says."""
    mark = "?" * (len(text) + 1)  # which is nowhere else in the prompt
    for i, message in enumerate(messages):
        role, marked = message["role"], [*messages[:i], {**message, "content": mark}, *messages[i + 1 :]]
        if role not in ROLES and mark not in prompt_of(marked):
            raise ValueError(
                f"message {i}: the chat template leaves out what has the role {role!r}: give it one of "
                f"{', '.join(ROLES)}"
            )


def _with_objects(message: Message) -> Message:
    """The message with its tool calls' arguments as the objects that templates write out."""
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"a tool call's arguments must be an object, or JSON of one: {call!r}")
    return {**call, "function": {**function, "arguments": arguments}}
