"""Short chat templates in the manner of well-known families, written for the tests."""

from __future__ import annotations

_CALL = '{"name": {{ c.function.name | tojson }}, "%s": {{ c.function.arguments | tojson }}}'

HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools><|im_end|>\n"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n"
    "<tool_response>{{ m.name }}: {{ m.content }}</tool_response>{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>" + _CALL % "arguments" + "</tool_call>{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML: tools in a system message, calls behind the content."""

QWEN = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}"
    "<|im_start|>user{% endif %}\n<tool_response>{{ m.content }}</tool_response>"
    "{% if loop.last or messages[loop.index].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last or m.reasoning_content %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>" + _CALL % "arguments" + "</tool_call>{% endfor %}"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""ChatML with thoughts before the last message only, and a tool's answers put together in a user's message."""

LLAMA = (
    "<|begin|>{% for m in messages %}{% if m.role == 'tool' %}<|head|>ipython<|end_head|>\n\n{{ m.content | tojson }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "<|head|>assistant<|end_head|>\n\n{% set c = m.tool_calls[0] %}" + _CALL % "parameters" + "{% else %}"
    "<|head|>{{ m.role }}<|end_head|>\n\n{% if tools and loop.first %}Functions:"
    "{% for t in tools %}{{ t | tojson(indent=1) }}{% endfor %}\n{% endif %}{{ m.content | trim }}{% endif %}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}"
)
"""Tools in the first message, one call a message, whose content is not shown."""

MISTRAL = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}<s>{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == users[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined %}{{ raise_exception('no id') }}{% endif %}"
    '[RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/RESULTS]'
    "{% elif m.tool_calls is defined and m.tool_calls is not none %}[CALLS][{% for c in m.tool_calls %}"
    + _CALL % "arguments"
    + "{{ ', ' if not loop.last }}{% endfor %}]</s>{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
"""Tools before the last question, nothing before an answer."""

CHANNELS = (
    "{% if tools %}<|start|>developer<|message|>{% for t in tools %}type {{ t.function.name }} // "
    "{{ t.function.description }}{% endfor %}<|end|>{% endif %}{% set ns = namespace(called='') %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') %}"
    "{% if m.thinking and not later | list %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}{% if m.tool_calls %}{% set ns.called = m.tool_calls[0].function.name %}"
    "<|start|>assistant to={{ ns.called }}"
    "<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|channel|>final"
    "<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% elif m.role == 'tool' %}"
    "<|start|>{{ ns.called }} to=assistant<|message|>{{ m.content | tojson }}<|end|>{% else %}"
    "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""Thoughts of the last answer alone, another end where it is the last, and answers of tools under the name called."""

SILENT = HERMES.replace(
    "{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls or [] if m.content is not defined else []) %}"
)
"""Calls of messages without content only."""

JOINS = HERMES.replace(_CALL % "arguments", "{{ c.function.name + ' ' + c.function.arguments }}")
"""Arguments must be text."""

PRINTS = HERMES.replace(_CALL % "arguments", "{{ c.function.name }} {{ c.function.arguments }}")
"""Arguments are expected to be text."""

NO_TOOLS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""Neither tools nor calls."""

NO_CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + NO_TOOLS
"""Tools, but no calls."""
