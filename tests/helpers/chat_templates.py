"""Chat templates in the manner of published ones: their structure, in this project's words. No text is copied.

FAMILIES gives for each the template, the kind of tokenizer it comes with, and the tokens that it sets.
"""

from __future__ import annotations

from dataclasses import dataclass

_LAST_QUESTION = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% set text = lead + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% set lead = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if lead else messages %}" + _LAST_QUESTION
    + "{% for m in turns %}{% if m.role == 'user' %}"
    "{% if tools and m == messages[ns.last] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ (lead if m == messages[ns.last] else '') + m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '01 Jan 2024' %}{%- endif %}"
    "{%- endif %}{%- set lead = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nKnows until 2023.\nToday: ' + date_string + '\n\n' + lead }}"
    "{%- if tools %}{{- '\nTools: ' + (tools | tojson) }}{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for m in (messages[1:] if lead else messages) %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- else %}{{- m.content | trim }}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '')"
    " + 'Tools: ' + (tools | tojson) + '<|im_end|>\n' }}{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
)
_CALLS = (
    "{%- for call in m.tool_calls or [] %}{%- set call = call.function or call %}{{- '\n<tool_call>\n{\"name\": \"' +"
    " call.name + '\", \"arguments\": ' + (call.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}"
)
QWEN25 = (
    _TOOLS + "{%- else %}{{- '<|im_start|>system\nYou answer questions.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- elif not (m.role == 'system' and loop.first) %}{{- '<|im_start|>' + m.role + '\n' + m.content }}"
    + _CALLS + "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_SPLIT = (
    "{%- set text = m.content %}{%- set why = m.reasoning_content or '' %}{%- if not why and '</think>' in text %}"
    "{%- set why = text.split('</think>')[0].split('<think>')[-1] %}{%- set text = text.split('</think>')[-1] %}"
    "{%- endif %}"
)


def _qwen3(generation: str) -> str:
    return (
        _TOOLS + "{%- endif %}" + _LAST_QUESTION + "{%- for m in messages %}{%- if m.role == 'assistant' %}" + _SPLIT
        + "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.last and (loop.last or why) %}"
        "{{- '<think>\n' + why.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{%- else %}{{- text.lstrip('\n') }}"
        "{%- endif %}" + _CALLS + "{{- '<|im_end|>\n' }}{%- elif m.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- elif not (m.role == 'system' and loop.first) %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}" + generation + "{%- endif %}"
    )


QWEN3 = _qwen3(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
)
QWEN3_THINKING = _qwen3("{{- '<think>\n' }}")


def _deepseek(generation: str) -> str:
    return (
        "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{ m.content }}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{%- elif m.role == 'assistant' %}{%- set text = m.content %}"
        "{%- if '</think>' in text %}{%- set text = text.split('</think>')[-1] %}{%- endif %}"
        "{{ '<｜Assistant｜>' + text + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<｜Assistant｜>" + generation + "' }}{%- endif %}"
    )


DEEPSEEK_R1_OLD = _deepseek("")
DEEPSEEK_R1 = _deepseek("<think>\n")
# Opens <think> before every answer, whatever the answer begins with.
DOUBLE_THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
SMOLLM3 = (
    "{%- set think = enable_thinking is not defined or enable_thinking %}"
    "{{- '<|im_start|>system\n## Facts\n\nToday is ' + strftime_now('%d %B %Y') + '. Mode: '"
    " + ('/think' if think else '/no_think') + '\n\n'"
    " + (messages[0].content if messages[0].role == 'system' else 'You answer questions.') + '<|im_end|>\n' }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{% generation %}{%- if think %}"
    "{{- '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif %}"
    "{% endgeneration %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') }}"
    "{%- endif %}"
)
GPT_OSS = (
    "{{- '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '\nReasoning: '"
    " + (reasoning_effort or 'medium') + '\n<|end|>' }}"
    "{%- if messages[0].role in ('system', 'developer') or tools %}"
    "{{- '<|start|>developer<|message|># Instructions\n\n'"
    " + (messages[0].content if messages[0].role in ('system', 'developer') else '')"
    " + ('\n# Tools\n' + (tools | tojson) if tools else '') + '<|end|>' }}{%- endif %}" + _LAST_QUESTION
    + "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content"
    " + '<|end|>' }}{%- elif m.role == 'assistant' %}"
    "{%- if m.thinking and loop.index0 > ns.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking"
    " + '<|end|>' }}{%- endif %}"
    "{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function or m.tool_calls[0] %}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>'"
    " + (call.arguments | tojson) + '<|call|>' }}"
    "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content"
    " + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{%- endif %}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
# Nothing ends an answer: the next turn's mark does.
GLM = (
    "[gMASK]{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set text = m.content.split('</think>')[-1].strip() %}"
    "<|assistant|>\n<think>{{ m.reasoning_content or '' }}</think>\n{{ text }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n<think></think>' if enable_thinking is defined and"
    " not enable_thinking else '' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template with its tokenizer: a kind of tokenizers_for_tests, and the tokens that it sets.

    `plain`: those of them that are not declared special. `swallows`: marks take the blanks behind them.
    """

    template: str
    kind: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    eos: str = "</s>"
    bos: str = "<s>"
    swallows: bool = False


_THINK = ("<think>", "</think>")
_CHATML = ("<|im_start|>", "<|im_end|>")
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
_R1 = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
FAMILIES = {
    "llama-2": Family(LLAMA2, "legacy", ()),
    "llama-3": Family(LLAMA3, "bytes", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), eos="<|eot_id|>"),
    "mistral-1": Family(MISTRAL1, "legacy", ()),
    "mistral-3": Family(
        MISTRAL3, "first",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]"),
    ),
    "mistral-7": Family(MISTRAL7, "bytes", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "zephyr": Family(ZEPHYR, "legacy", ()),
    "gemma": Family(GEMMA, "unprefixed", ("<start_of_turn>", "<end_of_turn>")),
    "phi-3": Family(
        PHI3, "legacy", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), eos="<|endoftext|>",
        swallows=True,
    ),
    "qwen-2.5": Family(QWEN25, "bytes", _CHATML, ("<tool_call>", "</tool_call>"), eos="<|im_end|>"),
    "qwen-3": Family(QWEN3, "bytes", _CHATML, (*_THINK, "<tool_call>", "</tool_call>"), eos="<|im_end|>"),
    "qwen-3-thinking": Family(QWEN3_THINKING, "bytes", _CHATML, _THINK, eos="<|im_end|>"),
    "deepseek-r1-old": Family(DEEPSEEK_R1_OLD, "bytes", _R1, _THINK, eos="<｜end▁of▁sentence｜>"),
    "deepseek-r1": Family(DEEPSEEK_R1, "bytes", _R1, _THINK, eos="<｜end▁of▁sentence｜>"),
    "smollm-3": Family(SMOLLM3, "bytes", _CHATML, _THINK, eos="<|im_end|>"),
    "gpt-oss": Family(GPT_OSS, "bytes", _HARMONY, eos="<|return|>"),
    "glm": Family(GLM, "bytes", ("[gMASK]", "<|user|>", "<|assistant|>", "<|system|>"), _THINK, eos="<|user|>"),
    # The tokenizers that no chat model of today has, under templates of those that have the same marks.
    "unigram": Family(ZEPHYR, "unigram", ()),
    "wordpiece": Family(GEMMA, "wordpiece", ("<start_of_turn>", "<end_of_turn>")),
}  # fmt: skip
