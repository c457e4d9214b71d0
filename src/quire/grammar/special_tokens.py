"""A vocabulary whose special tokens no text can spell.

llguidance tokenises the text that a grammar forces. Where this text holds the spelling of a special token, such as
`<|end|>`, its tokenizer would answer with that token, which is no text. So it gets the vocabulary with other names for
these tokens. A client's Lark grammar may still refer to a special token: by its real name, outside of quotes.
"""

import json
import re
import secrets
from collections.abc import Mapping

_LARK_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*|<[^<>\s\[][^<>\n]*>')
_ADDED = re.compile(r'"added_tokens"\s*:\s*')


def rename_special_tokens(tokenizer_json: str) -> tuple[str, dict[str, int]]:
    """The file's content with a random name for each special token, and the id of each real name.

    Returns the content unchanged if it holds no list of added tokens.
    """
    match = _ADDED.search(tokenizer_json)
    if match is None:
        return tokenizer_json, {}
    added, _ = json.JSONDecoder().raw_decode(tokenizer_json, match.end())
    ids = {str(token["content"]): int(token["id"]) for token in added if token.get("special")}
    if not ids:
        return tokenizer_json, {}
    secret = secrets.token_hex(16)  # a client that could guess a name could spell it
    names: dict[str, str] = {}
    for content, token_id in ids.items():
        for ensure_ascii in (False, True):
            names[json.dumps(content, ensure_ascii=ensure_ascii)] = f'"{secret}-{token_id}"'
    spelled = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    return spelled.sub(lambda found: names[found[0]], tokenizer_json), ids


def name_by_id(lark: str, ids: Mapping[str, int]) -> str:
    """The grammar with special tokens named by id. Texts, expressions and comments stay as they are."""

    def renamed(match: re.Match[str]) -> str:
        found = match[0]
        token_id = ids.get(found) if found[0] == "<" else None
        if token_id is None and found[0] == "<":
            token_id = ids.get(found[1:-1])
        return found if token_id is None else f"<[{token_id}]>"

    return _LARK_TOKEN.sub(renamed, lark)
