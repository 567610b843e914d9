"""Secrets: which names announce one, and values and texts without them for logs, records and dashboards."""

import re
from collections.abc import Mapping

MASK = "***"
# Within a name: DB_PASSWORD, PGPASSWORD, client_secret, credentials. Its end: hf_token. A sample's `key` is none.
_WITHIN = re.compile(r"password|passwd|passphrase|secret|credential|api_?key|access_?key|private_?key|auth_?key")
_END = re.compile(r"(^|_)(token|pwd|pass)$|_key$")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# After `scheme://user:`, up to the last @ before a space; digits up to a slash are a port.
_ADDRESS = re.compile(r"""(\w://[^\s/@:'"]*:)(?!\d+(?:[/\s]|$))[^\s'"]+@""")
_ONLY_TOKEN = re.compile(r"""(https?://)[^\s/@:'"]+@""")
_PAIR = re.compile(r"""([\w.-]+)=([^\s&;,'"]+|'[^']*'|"[^"]*")""")


def is_secret(key: str) -> bool:
    """Return whether a dotted key, or the name of an environment variable, announces a secret."""
    names = [_CAMEL.sub("_", name).lower().replace("-", "_") for name in key.split(".")]
    return any(_WITHIN.search(name) or _END.search(name) for name in names)


def mask_address(text: str) -> str:
    """Replace passwords in the addresses of a text, and values of `NAME=VALUE` whose name announces a secret."""
    text = _ONLY_TOKEN.sub(rf"\1{MASK}@", _ADDRESS.sub(rf"\1{MASK}@", text))
    return _PAIR.sub(lambda pair: f"{pair[1]}={MASK}" if is_secret(pair[1]) else pair[0], text)


def mask_secrets(values: Mapping[str, object]) -> dict[str, object]:
    """Return values by dotted key without secrets, in nested mappings and lists too; unset ones stay None."""
    return {key: _mask(value, is_hidden=is_secret(str(key))) for key, value in values.items()}


def _mask(value: object, *, is_hidden: bool) -> object:
    if isinstance(value, Mapping):
        return {name: _mask(inner, is_hidden=is_hidden or is_secret(str(name))) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(inner, is_hidden=is_hidden) for inner in value]
    if is_hidden and value is not None:
        return MASK
    return mask_address(value) if isinstance(value, str) else value
