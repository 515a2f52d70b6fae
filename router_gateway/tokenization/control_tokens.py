"""Keeps control tokens out of the texts of a chat: `<|im_end|>` in a message is text, in the template it is a token.

A control token is a special token, or another added token that the chat template writes around turns. A chat whose
texts hold no part of one is encoded as it is rendered, so that its ids are those of `transformers`. In another chat
the control tokens are found that the template alone has written:
1. It is rendered once more, with stand-ins for the characters of its texts that are a control token, or that could
   become one beside the template's text: one unused character for each, so that everything keeps its place.
2. What is a control token in that rendering is the template's, and becomes an alias that no text can know.
3. The stand-ins become their characters again, and a tokenizer that has the aliases in place of the control tokens
   encodes the whole.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Tokenizer

from router_gateway.tokenization.chat_template import ChatTemplate, TemplateRefusal, Tool, Turn

# Private-use characters: they have no case and are no space, so that templates leave them where they are.
_STAND_INS = range(0xF0000, 0xFFFFE)
_TURNS = (Turn("user", "x"), Turn("assistant", "x"), Turn("user", "x"))
_PLAIN_CHATS = ((Turn("system", "x"), *_TURNS), _TURNS)


class RenderedChat:
    """A conversation as its template renders it, with the texts in it and whether each is only a part of JSON."""

    def __init__(self, template: ChatTemplate, turns: Sequence[Turn], tools: Sequence[Tool] = ()) -> None:
        """Raises TemplateRefusal where the template refuses the conversation."""
        self.turns = turns
        self.tools = tools
        self.texts: dict[str, bool] = {}
        self.text = template.render(turns, tools, self._record)

    def _record(self, text: str, in_json: bool) -> str:
        self.texts[text] = in_json and self.texts.get(text, True)
        return text


class ControlTokenInText(Exception):
    """The tokenizer's model itself has a control token for this text."""


class ControlTokens:
    """The control tokens of a tokenizer; immutable and thread-safe."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._control = _control_tokens(tokenizer, added, template)
        contents = sorted((token.content for token in self._control.values()), key=len, reverse=True)
        self._contents = contents
        self._pattern = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        self._beginnings = tuple({content[:end] for content in contents for end in range(1, len(content))})
        self._endings = tuple({content[start:] for content in contents for start in range(1, len(content))})
        self._tokenizer = tokenizer
        # Whether normalizing may turn other text into a control token.
        self._normalized = tokenizer.normalizer is not None and any(one.normalized for one in self._control.values())
        self._aliases = {content: f"\ue000{secrets.token_hex(16)}\ue001" for content in contents}
        # Encodes control tokens as text and aliases as tokens.
        self.text_tokenizer = self._make_text_tokenizer([one for id, one in added.items() if id not in self._control])
        ids = self.text_tokenizer.token_to_id
        self._real_ids = {ids(token.content): id for id, token in added.items() if id not in self._control}
        self._real_ids |= {ids(self._aliases[token.content]): id for id, token in self._control.items()}

    def are_in(self, text: str) -> bool:
        """Whether the tokenizer would encode a part of the text as a control token."""
        return next(self._whole(text), None) is not None

    def mark(self, template: ChatTemplate, prompt: RenderedChat) -> str | None:
        """The rendered conversation for `text_tokenizer`; None where it can be encoded as it is.

        Raises TemplateRefusal where the template refuses the conversation with stand-ins.
        """
        stand_ins, rendered = _StandIns(prompt.texts), prompt.text
        hidden = {text: self._hide(text, in_json, stand_ins) for text, in_json in prompt.texts.items()}
        if not stand_ins.used:
            return None
        shown = template.render(prompt.turns, prompt.tools, lambda text, in_json: hidden[text])
        if not self._normalized and self._spans(shown) == self._spans(rendered) and stand_ins.undo(shown) == rendered:
            return None
        return stand_ins.undo(self._pattern.sub(lambda match: self._aliases[match[0]], shown))

    def real_ids(self, ids: Sequence[int]) -> list[int]:
        """The tokenizer's ids for those of `text_tokenizer`. Raises ControlTokenInText."""
        if any(id in self._control and id not in self._real_ids for id in set(ids)):
            raise ControlTokenInText
        return [self._real_ids.get(id, id) for id in ids]

    def _hide(self, text: str, in_json: bool, stand_ins: _StandIns) -> str:
        # A template reads the names in a JSON value, and writes the value as a whole.
        for start, end in self._whole(text) if in_json and text.isidentifier() else self._risks(text):
            text = text[:start] + stand_ins.replace(text[start:end]) + text[end:]
        return text

    def _risks(self, text: str) -> Iterator[tuple[int, int]]:
        """The spans of a message's text that are control tokens, or may become one beside the template's text."""
        yield from self._whole(text)
        # A template may strip the text.
        stripped = text.strip()
        start = len(text) - len(text.lstrip())
        if stripped.startswith(self._endings):
            yield start, start + max(len(ending) for ending in self._endings if stripped.startswith(ending))
        if stripped.endswith(self._beginnings):
            end = start + len(stripped)
            yield end - max(len(begin) for begin in self._beginnings if stripped.endswith(begin)), end
        if stripped and any(stripped in content for content in self._contents if len(stripped) < len(content)):
            yield start, start + len(stripped)

    def _whole(self, text: str) -> Iterator[tuple[int, int]]:
        yield from self._spans(text)
        if self._normalized:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            yield from (span for id, span in zip(encoding.ids, encoding.offsets, strict=True) if id in self._control)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in self._pattern.finditer(text)]

    def _make_text_tokenizer(self, others: Sequence[AddedToken]) -> Tokenizer:
        """A tokenizer that shares the model."""
        tokenizer = Tokenizer(self._tokenizer.model)
        for step in ("normalizer", "pre_tokenizer", "post_processor"):
            if (own := getattr(self._tokenizer, step)) is not None:
                setattr(tokenizer, step, own)
        tokenizer.add_tokens([*others, *(self._alias_of(token) for token in self._control.values())])
        return tokenizer

    def _alias_of(self, token: AddedToken) -> AddedToken:
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
        return AddedToken(self._aliases[token.content], normalized=False, **flags)


class _StandIns:
    """Unused characters in place of others, one for one; `texts` are all the texts of a conversation."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._free = (chr(code) for code in _STAND_INS if not any(chr(code) in text for text in texts))
        self._by_character: dict[str, str] = {}

    @property
    def used(self) -> bool:
        return bool(self._by_character)

    def replace(self, text: str) -> str:
        """The text with a stand-in for every character; those that are stand-ins remain."""
        known = set(self._by_character.values())
        return "".join(one if one in known else self._stand_in(one) for one in text)

    def undo(self, text: str) -> str:
        """The text with the original characters."""
        return text.translate({ord(stand_in): one for one, stand_in in self._by_character.items()})

    def _stand_in(self, character: str) -> str:
        if character not in self._by_character:
            self._by_character[character] = next(self._free)
        return self._by_character[character]


def _control_tokens(
    tokenizer: Tokenizer, added: dict[int, AddedToken], template: ChatTemplate | None
) -> dict[int, AddedToken]:
    """By id the special tokens, and the other added tokens that the template writes around turns.

    Special tokens are text everywhere where the tokenizer's files say so, by `split_special_tokens`.
    """
    rendered = _rendered_plain(template) if template else ""
    return {
        id: token
        for id, token in added.items()
        if token.content.strip() and (token.content in rendered, not tokenizer.encode_special_tokens)[token.special]
    }


def _rendered_plain(template: ChatTemplate) -> str:
    """A plain conversation, without a system turn where the template refuses one."""
    for turns in _PLAIN_CHATS:
        try:
            return template.render(turns)
        except TemplateRefusal:
            continue
    return ""
