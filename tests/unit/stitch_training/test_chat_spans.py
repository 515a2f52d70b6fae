"""Messages are found in renderings of every family's template, and tokens have the roles of their texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jinja2
import pytest

from stitch.errors import Incompatible
from stitch_training.chat_spans import content_spans
from stitch_training.data import Role, RoledToken, Turn
from stitch_training.folder_encoder import FolderEncoder
from tests.support.tool_templates import FAMILIES, Family

# Contents that are words of templates, have spaces at their ends, lines, and characters of several bytes.
TURNS = (
    Turn("user", "  assistant\n"),
    Turn("assistant", "Paris is 東京\n\nuser \N{GRINNING FACE}  "),
    Turn("user", "system"),
    Turn("assistant", "x", is_cut=True),
)


def encoder(folder: Path, family: Family) -> FolderEncoder:
    (folder / "tokenizer.json").write_text(family.tokenizer().to_str())
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **family.config()}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return FolderEncoder(folder)


def text_of(family: Family, tokens: Sequence[RoledToken]) -> str:
    return str(family.tokenizer().decode([token.token_id for token in tokens], skip_special_tokens=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_messages_have_their_roles(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    tokens = encoder(tmp_path, family).encode_chat(TURNS)
    by_role = {role: [token for token in tokens if token.role is role] for role in Role}
    user, assistant = text_of(family, by_role[Role.USER]), text_of(family, by_role[Role.ASSISTANT])
    contents = [turn.content.strip() if "trim" in family.template else turn.content for turn in TURNS]
    # A space that one family's template writes before an answer is in the answer's first token, or in one of its own.
    assert user == contents[0] + contents[2]
    assert assistant.lstrip(" ").replace(" x", "x") == (contents[1] + contents[3]).replace(" x", "x")
    # The second answer was cut off, so no token ends it.
    assert text_of(family, by_role[Role.END]) == family.end
    assert tokens.index(by_role[Role.END][0]) > tokens.index(by_role[Role.ASSISTANT][0])
    assert not by_role[Role.PLAIN]


@pytest.mark.parametrize("name", FAMILIES)
def test_conversation_has_the_ids_of_transformers(tmp_path: Path, name: str) -> None:
    encoding = encoder(tmp_path, FAMILIES[name])
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    expected = encoding._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [token.token_id for token in encoding.encode_chat(TURNS)] == expected


def spans(template: str, *contents: str) -> list[tuple[int, str]]:
    """Returns the number and the text of every message that is found in a rendering."""

    def render(given: Sequence[str]) -> str:
        environment = jinja2.Environment()
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        return environment.from_string(template).render(contents=list(given))

    text, found = content_spans(render, contents)
    return [(span.message, text[span.start : span.end]) for span in found]


EACH = "{% for c in contents %}"


@pytest.mark.parametrize(
    ("template", "contents", "expected"),
    [
        ("{% for c in contents %}assistant: {{ c }};{% endfor %}", ("a", "s", "a"), [(0, "a"), (1, "s"), (2, "a")]),
        (EACH + "{{ c | trim }}|{% endfor %}", (" one ", "\n two"), [(0, "one"), (1, "two")]),
        (EACH + "{{ c | tojson }},{% endfor %}", ('say "é"',), [(0, 'say \\"é\\"')]),
        ("{{ contents[0] }} {{ contents[1] }} {{ contents[0] }}", ("p", "q"), [(0, "p"), (1, "q"), (0, "p")]),
        ("{{ contents[1] }} alone", ("left out", "shown"), [(1, "shown")]),
        # A family's template leaves out what an answer says before `</think>`.
        (EACH + "{{ c.split('</think>')[-1] }};{% endfor %}", ("no</think>the end", "b"), [(0, "the end"), (1, "b")]),
        (EACH + "{{ c.split('<end>')[0] }};{% endfor %}", ("the answer<end>no", "b"), [(0, "the answer"), (1, "b")]),
        # It looks at how a message begins, so marks change it.
        (EACH + "{{ '[' if c.startswith('t') }}{{ c }}{% endfor %}", ("tool", "a"), [(0, "tool"), (1, "a")]),
        (EACH + "<{{ c }}>{% endfor %}", ("", "  ", "\U000f0000 is used\n"), [(1, "  "), (2, "\U000f0000 is used\n")]),
    ],
)  # fmt: skip
def test_messages_are_found(template: str, contents: tuple[str, ...], expected: list[tuple[int, str]]) -> None:
    assert spans(template, *contents) == expected


def test_message_that_a_template_changes_is_refused(tmp_path: Path) -> None:
    changed = "{{ contents[0] | upper if contents[0].startswith('t') else contents[0] }}"
    with pytest.raises(ValueError, match="does not render message 0 as it is: 'tool'"):
        spans(changed, "tool")
    family = Family("{{ (messages[0].content | length) * 'y' }}", "<|im_end|>")
    with pytest.raises(Incompatible, match="can't be told from the template's"):
        encoder(tmp_path, family).encode_chat([Turn("user", "abc")])
