"""Tests of chat templates: rendered as by `transformers`, and sandboxed."""

from __future__ import annotations

from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from router_gateway.tokenization.chat_template import ChatTemplate, TemplateRefusal, Turn

TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "Hi <b>you</b> & é你"),
    Turn("assistant", "Hello!"),
    Turn("user", "More?"),
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "blocks are trimmed": """
        {%- for message in messages %}
            {{- '<|' + message['role'] + '|>' }}
            {{ message.content | trim }}
        {% endfor %}
        {% if add_generation_prompt %}
            assistant:
        {% endif %}""",
    "special tokens": "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}",
    "tojson keeps HTML and letters": "{{ messages | tojson }} {{ messages[1] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "namespaces": "{% set n = namespace(c=0) %}{% for m in messages %}{% set n.c = n.c + 1 %}{% endfor %}{{ n.c }}",
    "absent tools": "{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}none",
    "generation blocks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_renders_as_in_transformers(name: str) -> None:
    conversation = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    expected, _ = render_jinja_template(
        [conversation], chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL
    )
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(TURNS) == expected[0]


def test_strftime_now_is_the_current_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(TURNS) == datetime.now().strftime("%Y")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_error_of_a_template_is_a_refusal(template: str, reason: str) -> None:
    with pytest.raises(TemplateRefusal, match=reason):
        ChatTemplate(template, {}).render(TURNS)
