"""The router of a cluster without a learned one: features of the text, hand-set weights, a logistic score.

score = 1 / (1 + exp(-(BIAS + sum of WEIGHTS[f] · f))), each feature f in [0, 1]

The weights are set by hand: a short question of fact scores about 0.2, one clear sign of a hard task adds 0.1 to 0.2,
and a long text with several of them scores about 0.9. Every text has a score; the ladder of thresholds turns it into a
route.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router_gateway.routing.router import Ladder, Query, ReasonKind, RouteDecision

BIAS = -2.2
WEIGHTS: Mapping[str, float] = {
    "length": 2.4,
    "turns": 0.6,
    "code": 1.4,
    "numbers": 0.9,
    "maths": 1.0,
    "reasoning": 1.6,
    "choice": 0.8,
    "constraints": 1.0,
}

# A reason shows at most this many features, those with the largest contributions.
SHOWN_FEATURES = 3
# Content is searched in this many characters at each end of a text: instructions are at its ends, and cost is bounded.
EXCERPT_CHARACTERS = 4_000
# Scripts without spaces have words too; in no language they are much longer on average.
CHARACTERS_PER_WORD = 6
# A word of Chinese or Japanese has about two characters.
IDEOGRAPHS_PER_WORD = 2
# The length feature is 1 from this many words on.
LONG_WORDS = 1_000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CODE = re.compile(
    r"```|^[ \t]*(?:def|class|import|from|return|#include|func|fn|public|SELECT)[ \t]"
    r"|[;{][ \t]*$|\b\w+\(\w*\)|=>|==|</\w",
    re.MULTILINE,
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_MATHS = re.compile(r"\\[a-z]{2,}|[=^√∑∫≤≥≠]|\d ?[-+*/×÷%] ?\d")
_WORD = re.compile(r"[^\W\d_]+")
_REASONING = _words(
    "why how explain prove derive compare analyse analyze design evaluate calculate solve reason step steps difference "
    "differences tradeoff summarise summarize translate refactor debug optimise optimize "
    "warum wieso erkläre beweise vergleiche berechne begründe pourquoi comment explique démontre démontrez calcule "
    "prouve explica demuestra calcula analiza resuelve razona compara perché spiega dimostra confronta "
    "explique demonstre почему зачем объясни объясните докажи докажите сравни сравните вычисли вычислите "
    "реши решите шагам czemu dlaczego wyjaśnij udowodnij neden niçin açıkla kanıtla لماذا اشرح أثبت برهن قارن احسب "
    "חשב הסבר הוכח מדוע למה"
)
# In scripts without spaces, or whose words take endings and marks that `_WORD` splits.
_REASONING_PARTS = re.compile(
    "为什么|为何|為什麼|為何|怎么|怎麼|怎样|怎樣|如何|解释|解釋|说明|說明|证明|證明|论证|論證|推导|推導|推理|逐步|一步一步|步骤|步驟|分步|"
    "比较|比較|对比|對比|区别|區別|分析|计算|計算|求解|解答|设计|設計|评估|評估|评价|評價|总结|總結|翻译|翻譯|重构|重構|调试|調試|优化|優化|"
    "なぜ|どうして|どのように|証明|説明|導出|段階|ステップ|順を追って|違い|解いて|解け|求めよ|求めて|評価|要約|翻訳|最適化|理由|考察|"
    "왜|어떻게|설명|증명|유도|단계|비교|차이|분석|계산|풀어|설계|평가|요약|번역|최적화|추론|이유|"
    "क्यों|कैसे|समझा|सिद्ध|तुलना|विश्लेषण|गणना|हल कर|কেন|ব্যাখ্যা|প্রমাণ|ทำไม|อธิบาย|พิสูจน์|เปรียบเทียบ|วิเคราะห์|คำนวณ|"
    "tại sao|vì sao|giải thích|chứng minh|so sánh|phân tích|từng bước|por qué|paso a paso|passo a passo|"
    "étape par étape|schritt für schritt"
)
_CONSTRAINTS = _words(
    "must should exactly least most without only except unless each every both avoid ensure never always"
)
_CONSTRAINT_PARTS = re.compile(
    "必须|必須|应该|應該|应当|應當|至少|至多|最多|不得|不要|不能|只能|除非|除了|每个|每個|避免|确保|確保|务必|務必|恰好|"
    "なければならない|べき|必ず|少なくとも|以内|以上|以下|だけ|のみ|ちょうど|せずに|"
    "반드시|최소|최대|정확히|않고|하지 마|오직|각각"
)
_IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
_CHOICE = re.compile(r"^[ \t]*\(?[A-D](?:[.):][ \t]|[、.):](?=[^\x00-\x7f]))", re.MULTILINE)
_LIST_ITEM = re.compile(r"^[ \t]*(?:(?:[-*•]|\d+[.)])[ \t]|\d+(?:、|[.)](?=[^\x00-\x7f]))|・)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of a text, 0 to 1, and its words in a reason, such as `12 words`."""

    name: str
    value: float
    description: str

    @property
    def contribution(self) -> float:
        return WEIGHTS[self.name] * self.value


class HeuristicRouter:
    """Scores a query by its features and looks the score up on the ladder."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder

    def decide(self, query: Query) -> RouteDecision:
        found = features(query.turns)
        score = logistic(BIAS + sum(feature.contribution for feature in found))
        route, compared = self._ladder.pick(score, query.routes, query.pressure)
        return RouteDecision(route, score, f"{_describe(found)}: {compared}", _kind(found))


def logistic(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit))


def features(turns: Sequence[str]) -> list[Feature]:
    """All features of a user's turns, `length` first, also those that are 0."""
    text = "\n".join(turns)
    # Full-width letters, digits and signs are read as the usual ones, and letters with marks as one character.
    excerpt = unicodedata.normalize("NFKC", _excerpt(text))
    ideographs = len(_IDEOGRAPH.findall(excerpt))
    words = max(len(excerpt.split()), len(text) // CHARACTERS_PER_WORD, ideographs // IDEOGRAPHS_PER_WORD)
    return [
        Feature("length", min(math.log(words + 1, LONG_WORDS + 1), 1.0), _count(words, "word")),
        *_content_features(excerpt),
        _counted("turns", len(turns) - 1, 4, "earlier turn"),
    ]


def _content_features(text: str) -> list[Feature]:
    choices = len(_CHOICE.findall(text))
    lowered = text.lower()
    words = _WORD.findall(lowered)
    reasoning = sum(word in _REASONING for word in words) + len(_REASONING_PARTS.findall(lowered))
    constraints = sum(word in _CONSTRAINTS for word in words) + len(_CONSTRAINT_PARTS.findall(lowered))
    constraints += len(_LIST_ITEM.findall(text))
    return [
        _counted("code", len(_CODE.findall(text)), 3, "sign of code", "signs of code"),
        _counted("numbers", len(_NUMBER.findall(text)), 6, "number"),
        _counted("maths", len(_MATHS.findall(text)), 3, "formula"),
        _counted("reasoning", reasoning, 2, "reasoning word"),
        # One lettered line is a heading; two are a choice.
        Feature("choice", float(choices >= 2), _count(choices, "choice")),
        _counted("constraints", constraints, 4, "constraint"),
    ]


def _excerpt(text: str) -> str:
    if len(text) <= 2 * EXCERPT_CHARACTERS:
        return text
    return f"{text[:EXCERPT_CHARACTERS]}\n{text[-EXCERPT_CHARACTERS:]}"


def _counted(name: str, count: int, full: int, singular: str, plural: str = "") -> Feature:
    """A feature that is 1 from `full` occurrences on."""
    return Feature(name, min(max(count, 0) / full, 1.0), _count(count, singular, plural))


def _count(count: int, singular: str, plural: str = "") -> str:
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def _describe(found: Sequence[Feature]) -> str:
    """The length and the features with the largest contributions, for people to read."""
    length, *content = found
    largest = sorted((one for one in content if one.value), key=lambda one: one.contribution, reverse=True)
    return ", ".join(feature.description for feature in [length, *largest[: SHOWN_FEATURES - 1]])


def _kind(found: Sequence[Feature]) -> ReasonKind:
    """Whether the length or all other features together contribute more."""
    length, *content = found
    return "length" if length.contribution >= sum(feature.contribution for feature in content) else "content"
