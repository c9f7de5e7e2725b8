"""Conversations become prompts through the tokenizer's chat template."""

import pytest
from small_model import assert_idle, small_llm, whole, write_checkpoint

from nanovllm_jax import SamplingParams
from nanovllm_jax.chat import chat_prompt
from nanovllm_jax.checkpoints.load import TINY_MODEL
from nanovllm_jax.checkpoints.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("programs_kept")

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
USER = {"role": "user", "content": "What is 2 + 3?"}
OPEN = "<|im_start|>assistant\n"
ASKED = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def tokenizer():
    return load_tokenizer(TINY_MODEL)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return small_llm(write_checkpoint(tmp_path_factory.mktemp("chat") / "model"))


# --- prompts ---

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}

CONVERSATIONS = {
    "one turn": ([USER], ASKED + OPEN),
    "system": (
        [{"role": "system", "content": "Be brief."}, USER],
        "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED + OPEN,
    ),
    "several turns": (
        [USER, {"role": "assistant", "content": "5"}, {"role": "user", "content": "And 4 + 4?"}],
        ASKED + OPEN + "5<|im_end|>\n<|im_start|>user\nAnd 4 + 4?<|im_end|>\n" + OPEN,
    ),
    "a tool's answer": (
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "5"}],
        ASKED
        + OPEN
        + '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        + "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        + OPEN,
    ),
}


def call(arguments):
    function = {"name": "add"} if arguments is None else {"name": "add", "arguments": arguments}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]


@pytest.mark.parametrize(("sent", "meant"), [('{"a":2,"b":"é"}', {"a": 2, "b": "é"}), ("", {}), (None, {})])
def test_arguments_of_a_call_may_be_json(tokenizer, sent, meant):
    """As OpenAI's clients send them; what the caller gave stays as it was."""
    messages = call(sent)
    assert chat_prompt(tokenizer, messages) == chat_prompt(tokenizer, call(meant))
    assert messages == call(sent)


@pytest.mark.parametrize("arguments", ["2 and 3", "[2, 3]", [2, 3], [], 0, "[" * 100_000])
def test_arguments_of_a_call_that_are_none(tokenizer, arguments):
    with pytest.raises(ValueError, match="a tool call's arguments must be an object, or JSON of one"):
        chat_prompt(tokenizer, call(arguments))


def test_a_message_that_is_continued(tokenizer):
    messages = [USER, {"role": "assistant", "content": "2 + 3 ="}]
    prompt = chat_prompt(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)["prompt"]
    assert prompt.startswith(ASKED)
    assert prompt.endswith("2 + 3 =")
    with pytest.raises(ValueError, match="the chat template refuses the messages or their options"):
        chat_prompt(tokenizer, messages, continue_final_message=True)  # and open a turn


def test_a_template_of_ones_own(tokenizer):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert chat_prompt(tokenizer, [USER], chat_template=template)["prompt"] == "[What is 2 + 3?]"
    tokenizer.chat_template = None
    assert chat_prompt(tokenizer, [USER], chat_template=template)["prompt"] == "[What is 2 + 3?]"


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_what_the_template_writes(tokenizer, case):
    messages, text = CONVERSATIONS[case]
    prompt = chat_prompt(tokenizer, messages)
    if case == "a tool's answer":  # whether reasoning that is empty is written is the template's business
        assert prompt["prompt"].replace("<think>\n\n</think>\n\n", "") == text.replace("<think>\n\n</think>\n\n", "")
    else:
        assert prompt["prompt"] == text
    assert prompt["prompt_token_ids"] == tokenizer.encode(prompt["prompt"], add_special_tokens=False)


def test_options_reach_the_template(tokenizer):
    thoughtless = chat_prompt(tokenizer, [USER], chat_template_kwargs={"enable_thinking": False})
    assert thoughtless["prompt"] == ASKED + OPEN + "<think>\n\n</think>\n\n"
    thinking = chat_prompt(tokenizer, [USER], chat_template_kwargs={"enable_thinking": True})
    assert thinking["prompt"] == ASKED + OPEN
    assert chat_prompt(tokenizer, [USER], add_generation_prompt=False)["prompt"] == ASKED
    with_tools = chat_prompt(tokenizer, [USER], tools=[TOOL])["prompt"]
    assert '"name": "add"' in with_tools
    assert with_tools.endswith(ASKED + OPEN)


def test_the_template_alone_writes_special_tokens(tokenizer):
    """A tokenizer that puts a token before each text does not put it before the template's."""
    from tokenizers.processors import TemplateProcessing

    start = ("<|endoftext|>", 507)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    assert tokenizer.encode("a")[0] == 507
    tokens = chat_prompt(tokenizer, [USER])["prompt_token_ids"]
    assert tokenizer.decode(tokens) == ASKED + OPEN


# --- LLM.chat ---


def test_chat_is_generate_of_the_templates_text(llm):
    conversations = [[USER], [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]]
    prompts = [
        llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False)
    assert whole(outputs) == whole(expected)
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == [
        (output.prompt, output.prompt_token_ids) for output in expected
    ]
    assert whole(llm.chat(conversations[0], GREEDY, use_tqdm=False)) == whole(expected[:1])
    assert whole(llm.chat(tuple(conversations), [GREEDY, GREEDY], use_tqdm=False)) == whole(expected)
    assert llm.chat([], GREEDY) == []


def test_the_options_of_chat(llm):
    options = dict(chat_template_kwargs={"enable_thinking": False}, add_generation_prompt=True)
    (output,) = llm.chat([USER], GREEDY, False, **options)
    assert output.prompt == ASKED + OPEN + "<think>\n\n</think>\n\n"
    (output,) = llm.chat([USER], GREEDY, False, add_generation_prompt=False)
    assert output.prompt == ASKED
    (output,) = llm.chat([USER], GREEDY, False, chat_template="{{ messages[0].content }}")
    assert output.prompt == USER["content"]
    assert len(llm.chat([USER], use_tqdm=False)[0]["token_ids"]) <= 16


def test_a_turn_finds_the_ones_before_in_the_prefix_cache(llm):
    llm.reset_prefix_cache()
    messages = [{"role": "user", "content": "What is 2 + 3? And 4 + 5? And 6 + 7 + 8?"}]
    first = llm.chat(messages, GREEDY, False)[0]
    messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "more"}]
    second = llm.chat(messages, GREEDY, False)[0]
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= len(first.prompt_token_ids) // 16 * 16 > 0


# --- what is refused ---

BAD_MESSAGES = {
    "none": (None, TypeError, "messages must be a list of messages, or a list of such lists, not None"),
    "a text": ("hello", TypeError, "messages must be a list of messages, .* not 'hello'"),
    "one message": (USER, TypeError, "messages must be a list of messages, .* not {'role'"),
    "texts": (["hello"], TypeError, "a conversation must be a list of messages, not 'hello'"),
    "no messages": ([[]], ValueError, "a conversation must have at least one message"),
    "a text among messages": ([USER, "hello"], TypeError, "message 1 must be a dict with 'role' and 'content', not 'h"),
    "no role": ([{"content": "a"}], ValueError, "message 0 must have a 'role' that is a string: {'content': 'a'}"),
    "a role that is no text": ([{"role": 1, "content": "a"}], ValueError, "message 0 must have a 'role'"),
    "content that is no text": (
        [USER, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
        TypeError,
        r"message 1 must have a 'content' that is a string, not \[{'type'",
    ),
    "a role that the template does not know": (
        [{"role": "developer", "content": "Be brief."}, USER],
        ValueError,
        "message 0: the chat template leaves out what has the role 'developer': give it one of system, user",
    ),
    "such a role, whose content is said by others": (
        [USER, {"role": "function", "content": USER["content"][:2]}, USER],
        ValueError,
        "message 1: the chat template leaves out what has the role 'function'",
    ),
    "such a role without content": (
        [USER, {"role": "Assistant", "content": None}],
        ValueError,
        "message 1: the chat template leaves out what has the role 'Assistant'",
    ),
    "half a surrogate pair": ([{"role": "user", "content": "\ud800"}], ValueError, "is not valid Unicode text"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages(llm, case):
    messages, error, message = BAD_MESSAGES[case]
    with pytest.raises(error, match=message):
        llm.chat(messages, GREEDY)
    assert_idle(llm)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(chat_template_kwargs=[1]), TypeError, r"chat_template_kwargs must be a dict or None, not \[1\]"),
        (dict(chat_template_kwargs={"tokenize": True}), ValueError, "chat_template_kwargs must not have 'tokenize'"),
        (dict(tools="add"), ValueError, "the chat template refuses the messages or their options"),
        (dict(add_generation_prompt="no"), TypeError, "add_generation_prompt must be True or False, not 'no'"),
        (dict(continue_final_message=1), TypeError, "continue_final_message must be True or False, not 1"),
        (dict(chat_template=1), TypeError, "chat_template must be a string or None, not 1"),
        (dict(chat_template_kwargs={"chat_template": ""}), ValueError, "must not have 'chat_template'"),
    ],
)
def test_bad_options(llm, options, error, message):
    with pytest.raises(error, match=message):
        llm.chat([USER], GREEDY, **options)
    assert_idle(llm)


def test_which_conversation_is_bad(llm):
    with pytest.raises(ValueError, match="message 0 must have a 'role'") as caught:
        llm.chat([[USER], [{"content": "a"}]], GREEDY)
    assert caught.value.__notes__ == ["This is conversation 1 of 2, counted from 0; none was started."]


def test_a_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template refuses the messages or their options: roles must alt"):
        chat_prompt(tokenizer, [USER])
    tokenizer.chat_template = "{{ messages[0].name.first }}"
    with pytest.raises(ValueError, match="the chat template refuses"):
        chat_prompt(tokenizer, [USER])
    tokenizer.chat_template = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    with pytest.raises(ValueError, match=r"the chat template refuses .* recursion"):
        chat_prompt(tokenizer, [USER])
    tokenizer.chat_template = "{{ messages.append(1) }}{{ ''.__class__.__mro__ }}"
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        chat_prompt(tokenizer, [USER])
    tokenizer.chat_template = "{% for"
    with pytest.raises(ValueError, match="the chat template refuses"):
        chat_prompt(tokenizer, [USER])


def test_without_a_template_or_a_tokenizer(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: write the prompt yourself, for generate"):
        chat_prompt(tokenizer, [USER])
    with pytest.raises(ValueError, match="has no tokenizer, so no chat: give token ids to generate"):
        chat_prompt(None, [USER])
