"""Chat templates that show tools, each in the format of a family, and a tokenizer with the family's control tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer

from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.fake_shard import FakeShard

_CHATML_TAGGED = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools\\n\\nYou may call functions, described within <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\n\\nReturn a JSON object within <tool_call></tool_call> for each call.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first)
       or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}{% if message.content %}{{- '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}{% set call = call.function %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- system + '<|eot_id|>' }}
{%- if tools is not none %}
{%- set first = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nRespond with JSON {"name": …, "parameters": …}.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{% endfor %}
{{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if message.content is mapping %}{{- message.content | tojson }}{% else %}{{- message.content }}{% endif %}
{{- '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_BRACKETS = """\
{{- bos_token }}
{%- set user_messages = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools is not none and message == user_messages[-1] %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' and message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{% endif %}
{%- set shown = call.function | tojson %}
{{- shown[:-1] + ', "id": "' + call.id + '"}' }}{% if not loop.last %}{{- ', ' }}{% endif %}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + (message.content | tojson) + ', "call_id": "' + message.tool_call_id + '"}' }}
{{- '[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""

_PYTHON_TYPES = """\
{%- macro of(spec) %}
{%- if spec.type == 'string' %}str{% elif spec.type == 'integer' %}int
{%- elif spec.type == 'array' %}{{- 'list[' + of(spec['items']) + ']' }}{% else %}Any{% endif %}
{%- endmacro %}
{{- bos_token }}{{- '<|im_start|>system\\nYou call functions. <tools> ' }}
{%- for tool in tools or [] %}{% set tool = tool.function %}
{{- '{"type": "function", "function": {"name": "' + tool.name + '", "description": "' + tool.name + '(' }}
{%- for name, spec in tool.parameters.properties | items %}
{{- name + ': ' + of(spec) }}{% if not loop.last %}{{- ', ' }}{% endif %}
{%- endfor %}
{{- ') - ' + (tool.description or '') + '", "parameters": ' + (tool.parameters | tojson) + '}}\\n' }}
{%- endfor %}
{{- ' </tools><|im_end|>\\n' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>tool\\n<tool_response>\\n' }}
{%- if message.name %}{{- '{"name": "' + message.name + '", "content": ' + message.content + '}' }}
{%- else %}{{- message.content }}{% endif %}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.tool_calls %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- for call in message.tool_calls %}{% set call = call.function if call.function else call %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>\\n' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_LIST_IN_ROLES = """\
{%- if tools %}
{{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|start_of_role|>tool_response<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}
{%- elif message.role == 'assistant' and message.tool_calls %}
{{- '<|start_of_role|>assistant<|end_of_role|>' + message.content + '<|tool_call|>' }}
{%- set found = namespace(calls=[]) %}
{%- for call in message.tool_calls %}{% set found.calls = found.calls + [call.function] %}{% endfor %}
{{- found.calls | tojson }}{{- '<|end_of_text|>\\n' }}
{%- else %}
{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A template, its tokens in addition to those of the byte tokenizer, and two calls as a model writes them."""

    template: str
    end: str
    special: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    one_call: str = ""
    # None: the template shows one call an answer.
    two_calls: str | None = None

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(byte_tokenizer().to_str())
        tokenizer.add_special_tokens(list(self.special))
        tokenizer.add_tokens([AddedToken(one, normalized=False) for one in self.other])
        return tokenizer

    def config(self) -> dict[str, str]:
        return {"eos_token": self.end, "bos_token": "<|im_start|>", "chat_template": self.template}


WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
TIME = '{"name": "get_time", "arguments": {}}'
_TAGGED = f"<tool_call>\n{WEATHER}\n</tool_call>"
_TWO_TAGGED = f"{_TAGGED}\n<tool_call>\n{TIME}\n</tool_call>"

FAMILIES = {
    "qwen2.5": Family(_CHATML_TAGGED, "<|im_end|>", (), ("<tool_call>", "</tool_call>"), _TAGGED, _TWO_TAGGED),
    "hermes": Family(_PYTHON_TYPES, "<|im_end|>", (), (), _TAGGED, _TWO_TAGGED),
    "llama3": Family(
        _HEADERS,
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        (),
        WEATHER.replace("arguments", "parameters"),
    ),
    "mistral": Family(
        _BRACKETS,
        "</s>",
        ("</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
        (),
        f"[TOOL_CALLS] [{WEATHER}]",
        f"[TOOL_CALLS] [{WEATHER}, {TIME}]",
    ),
    "granite": Family(
        _LIST_IN_ROLES,
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
        (),
        f"<|tool_call|>[{WEATHER}]",
        f"<|tool_call|>[{WEATHER}, {TIME}]",
    ),
}


def tool_shards(text: str = "", family: str = "qwen2.5") -> tuple[FakeShard, FakeShard]:
    """Shards whose tokenizer is that of a family, and that answer with this text."""
    given = FAMILIES[family]
    bottom = FakeShard("bottom-0", "bottom", given.tokenizer().encode(text, add_special_tokens=False).ids)
    end = given.tokenizer().token_to_id(given.end)
    bottom.files = {
        "tokenizer.json": given.tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(given.config()).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [2, end]}).encode(),
    }
    bottom.context_tokens = 1_000
    top = FakeShard("top-0", "top")
    top.context_tokens = 1_000
    return bottom, top
