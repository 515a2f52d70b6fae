"""Reads a model's tokenizer files: special tokens, end tokens, chat template, and a hash of the ids.

In go the files' contents by name. They are the contract between a shard, which sends them, and the gateway, which
tokenizes with them. Tokens get the ids and flags that `transformers.TokenizersBackend.from_pretrained` gives them.
Every invalid field raises Incompatible, which names the file, the field and the value. Imports neither torch nor
`tokenizers`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stitch.errors import Incompatible, shown

Files = Mapping[str, bytes]
# Arguments of `tokenizers.AddedToken`.
Token = dict[str, Any]

# The files that a shard may send; only `tokenizer.json` is required.
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
CONFIG = "tokenizer_config.json"
# The special tokens that every tokenizer may have; others have names of their own that end in `_token`.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What `transformers` takes for names that no file states, by `tokenizer_class`.
DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
# The families whose `tokenizer_class` counts.
DECLARING_FAMILIES = ("llama", "gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe", "smollm3")
# The fields of generation_config.json that are defaults of requests.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


class SpecialTokens(NamedTuple):
    """Special tokens by the names that chat templates use, and the tokens to add to those of tokenizer.json."""

    named: dict[str, str]
    # In the order in which they are added: it determines the ids of new tokens.
    added: list[Token]


def paths(folder: Path) -> list[Path]:
    """Returns the folder's tokenizer files."""
    return [path for name in NAMES if (path := folder / name).is_file()]


def read(folder: Path) -> dict[str, bytes]:
    """Returns the contents of the folder's tokenizer files."""
    return {path.name: path.read_bytes() for path in paths(folder)}


def check(folder: Path) -> None:
    """Raises Incompatible where a gateway could not use the folder's tokenizer."""
    files = read(folder)
    chat_template(files)
    end_tokens(files, max(_ids(files, _tokenizer(folder, files)).values()) + 1)


def tokenizer_hash(folder: Path) -> str:
    """Returns SHA-256 in hex over the tokens with their ids, and the merges; the two models of a pair must share it.

    The same tokenizer written by different programs has the same hash: merges are pairs or strings, and added
    tokens may be in any of the files. Raises Incompatible if tokenizer.json is missing.
    """
    files = read(folder)
    fields = _tokenizer(folder, files)
    canonical = json.dumps([_ids(files, fields), _merges(fields["model"])], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def token_count(folder: Path) -> int:
    """Returns the end of the tokens' ids; a model's vocabulary may be padded beyond it."""
    files = read(folder)
    return max(_ids(files, _tokenizer(folder, files)).values()) + 1


def _tokenizer(folder: Path, files: Files) -> dict[str, Any]:
    if "tokenizer.json" not in files:
        raise Incompatible(f"{folder} has no tokenizer.json")
    return json_object(files, "tokenizer.json")


def _ids(files: Files, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Returns all tokens with their ids, those included that only other files than tokenizer.json have."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):
            # Unigram: token and score, in the order of their ids.
            vocabulary = {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        ids = {**vocabulary, **added}
        _ = max(ids.values()) + 1
    except (KeyError, TypeError, ValueError) as error:
        raise Incompatible(f"tokenizer.json is no tokenizer with tokens and ids: {shown(error)}") from error
    for token in special_tokens(files, tokenizer.get("added_tokens", [])).added:
        if content := token["content"]:
            # As `tokenizers` numbers new tokens.
            new = max(len(vocabulary), max(added.values(), default=0) + 1)
            added[content] = ids.setdefault(content, new)
    return ids


def special_tokens(files: Files, listed: Sequence[Mapping[str, Any]]) -> SpecialTokens:
    """Returns what the files say about special tokens; `listed` are the added tokens of tokenizer.json.

    Where tokenizer_config.json has `added_tokens_decoder`, special_tokens_map.json and added_tokens.json don't count.
    """
    config, source = json_object(files, CONFIG), CONFIG
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if "added_tokens_decoder" in config:
        by_id = _decoder(config["added_tokens_decoder"])
    else:
        given, source = json_object(files, "special_tokens_map.json"), f"special_tokens_map.json or {CONFIG}"
        config |= given
        # As in transformers, an object of tokenizer_config.json makes no token of added_tokens.json special.
        names = {name: config.get(name) for name in NAMED if name in given or isinstance(config.get(name), str)}
        strings = [token for token in extra if isinstance(token, str)] if isinstance(extra, list) else []
        special = {*_contents(_named(names, {}, source).values()), *strings}
        by_id = _added(json_object(files, "added_tokens.json"), special)
        by_id |= {token["id"]: _token(token, "added_tokens", "tokenizer.json") for token in listed}
        extra = _joined(extra, given)
    defaults = DEFAULTS.get(tokenizer_class(files), {})
    known = _contents(listed)
    config = {name: token for name, token in defaults.items() if token in known} | config
    named = _named(config, extra if isinstance(extra, dict) else {}, source)
    return SpecialTokens(
        {name: token["content"] for name, token in named.items()},
        _to_add([by_id[token_id] for token_id in sorted(by_id)], named, _tokens(extra, source), listed),
    )


def _to_add(
    queue: list[Token], named: Mapping[str, Token], extra: Sequence[Token], listed: Sequence[Mapping[str, Any]]
) -> list[Token]:
    contents = {*_contents(listed), *_contents(queue)}
    queue = queue + [token for token in (*named.values(), *extra) if token["content"] not in contents]
    names = _contents(named.values())
    return [token | {"special": token["special"] or token["content"] in names} for token in queue]


def _contents(tokens: Iterable[Mapping[str, Any]]) -> set[str]:
    return {token["content"] for token in tokens}


def tokenizer_class(files: Files) -> str:
    """Returns the class that `transformers.AutoTokenizer` takes, without `Fast`; empty for the general one."""
    family = json_object(files, "config.json").get("model_type")
    if family == "qwen2":
        return "Qwen2Tokenizer"
    declared = json_object(files, CONFIG).get("tokenizer_class")
    return str(declared).removesuffix("Fast") if family in DECLARING_FAMILIES or family is None else ""


def end_tokens(files: Files, tokens: int) -> list[int]:
    """Returns the ids that generation_config.json states, else config.json.

    `tokens` is the end of the tokenizer's ids; a model may have more.
    """
    size = json_object(files, "config.json").get("vocab_size")
    end = max(tokens, size) if isinstance(size, int) else tokens
    for name in ("generation_config.json", "config.json"):
        given = json_object(files, name).get("eos_token_id")
        if given is not None:
            ids = given if isinstance(given, list) else [given]
            for token_id in ids:
                if type(token_id) is not int or not 0 <= token_id < end:
                    raise _invalid(name, "eos_token_id", token_id, f"it must be a token's id, 0 to {end - 1}")
            return ids
    return []


def sampling_defaults(files: Files) -> dict[str, float]:
    """Returns what generation_config.json says of sampling, by the names of `Sampling`; what is no number is left out.

    As vLLM does, it takes no notice of `do_sample`.
    """
    given = json_object(files, "generation_config.json")
    return {name: given[name] for name in SAMPLING if type(given.get(name)) in (int, float)}


def chat_template(files: Files) -> tuple[str | None, str]:
    """Returns the template's source; without one, None and the reason."""
    if "chat_template.jinja" in files:
        return _text(files, "chat_template.jinja"), ""
    name = CONFIG
    given = json_object(files, name).get("chat_template")
    if given is None:
        # Where processors of text and images had it.
        name = "chat_template.json"
        given = json_object(files, name).get("chat_template")
    if isinstance(given, list):
        given = dict(_named_template(entry, name) for entry in given)
    if isinstance(given, dict) and "default" not in given:
        return None, f"none of its chat templates is named default: {', '.join(sorted(given)) or 'it has none'}"
    source = given["default"] if isinstance(given, dict) else given
    if source is None:
        return None, "the model has no chat template"
    if not isinstance(source, str):
        raise _invalid(name, "chat_template", source, "it must be a Jinja template, or a list of named ones")
    return source, ""


def json_object(files: Files, name: str) -> dict[str, Any]:
    """Returns a file's JSON object; an empty one for a missing file."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        pointer = files[name].startswith(b"version https://git-lfs")
        reason = "it is a Git LFS pointer, and the file itself was not downloaded" if pointer else error
        raise Incompatible(f"{name} can't be read: {reason}") from error
    if not isinstance(content, dict):
        raise Incompatible(f"{name} holds no object, but {type(content).__name__}")
    return content


def _text(files: Files, name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise Incompatible(f"{name} can't be read: {error}") from error


def _merges(model: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]


def _named(config: Mapping[str, Any], extra: Mapping[str, Any], source: str) -> dict[str, Token]:
    """Returns the special tokens with names: the usual ones, then those of this model."""
    given = {name: config[name] for name in NAMED if config.get(name) is not None}
    own = {name: value for name, value in config.items() if name.endswith("_token") and _is_token(value)}
    return {name: _token(value, name, source) for name, value in {**given, **own, **extra}.items()}


def _joined(extra: Any, given: Mapping[str, Any]) -> Any:
    """Returns the extra tokens of tokenizer_config.json together with those of special_tokens_map.json."""
    more = given.get("extra_special_tokens")
    if isinstance(extra, list) and isinstance(more, list):
        return [*extra, *more]
    return extra or more or given.get("additional_special_tokens")


def _tokens(given: Any, source: str) -> list[Token]:
    if given is None or isinstance(given, dict):
        return []
    if not isinstance(given, list):
        raise _invalid(source, "additional_special_tokens", given, "it must be a list of tokens")
    return [_token(token, "additional_special_tokens", source) for token in given]


def _decoder(given: Any) -> dict[int, Token]:
    field = "added_tokens_decoder"
    if not isinstance(given, dict):
        raise _invalid(CONFIG, field, given, "it must be an object of ids with tokens")
    for token_id in given:
        if not token_id.isdecimal():
            raise _invalid(CONFIG, field, token_id, "a token's id must be a number from 0")
    return {int(token_id): _token(token, field, CONFIG, special=False) for token_id, token in given.items()}


def _added(given: Mapping[str, Any], special: Collection[str]) -> dict[int, Token]:
    for token, token_id in given.items():
        if type(token_id) is not int or token_id < 0:
            raise _invalid("added_tokens.json", token, token_id, "a token's id must be a number from 0")
    tokens = ((token_id, token, token in special) for token, token_id in given.items())
    return {
        token_id: {"content": token, "special": known, "normalized": not known} for token_id, token, known in tokens
    }


def _is_token(given: Any) -> bool:
    content = given["content"] if isinstance(given, dict) and "content" in given else given
    # JSON can spell half of a surrogate pair, which is no text.
    return isinstance(content, str) and not any("\ud800" <= character <= "\udfff" for character in content)


def _token(given: Any, field: str, source: str, special: bool = True) -> Token:
    """Returns a token that is given as a string, or as an object with `content` and flags."""
    if not _is_token(given):
        raise _invalid(source, field, given, "it must be a string, or an object with content")
    if isinstance(given, str):
        return {"content": given, "special": True}
    flags = {name: bool(given[name]) for name in FLAGS if name in given}
    return {"content": given["content"], "special": special, **flags}


def _named_template(entry: Any, source: str) -> tuple[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "template" not in entry:
        raise _invalid(source, "chat_template", entry, "every template of a list needs a name and a template")
    return entry["name"], entry["template"]


def _invalid(source: str, field: str, value: Any, limit: str) -> Incompatible:
    return Incompatible(f"{source}: {field} is {shown(value, 80)}, but {limit}")
