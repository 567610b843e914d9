"""The place of a data set's tars: a folder, or the URL of one in an object store."""

import re
from pathlib import Path

from data.arguments import ArgumentError, require

URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")


class Url(str):
    """The URL of a folder in an object store, without a slash at its end."""

    __slots__ = ()

    @property
    def scheme(self) -> str:
        """The part before `://`, in lower case."""
        return self.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part, as of a folder."""
        return self.rpartition("/")[2]


Root = Path | Url


def parse_root(text: str) -> Root:
    """Return the URL or the folder that a text names. Raises: ArgumentError for a URL that no object store has."""
    match = URL.match(text)
    if match is None:
        return Path(text)
    rest = text[match.end() :]
    address = rest.partition("/")[0]
    user = address.rpartition("@")[0]  # of abfs:// it is the container
    if any(mark in rest for mark in "?#") or ":" in user or (user and match[1].lower().startswith("http")):
        text_without = f"{match[1]}://{address.rpartition('@')[2]}"
        rule = " has a password or a signature: an environment variable is the place for secrets"
        raise ArgumentError(("root", text_without), rule)
    known = "s3://, gs://, az://, abfs://, http:// or https://"
    require(match[1].lower() in SCHEMES and bool(address), f"is not a URL of {known}", root=text)
    return Url(text.rstrip("/"))


def local_folder(text: str, /, **argument: object) -> Path:
    """Return a folder for files that are written. Raises: ArgumentError for a URL."""
    require(URL.match(text) is None, "is a URL: give a folder on this machine", **argument)
    return Path(text)


def join(root: Root, file: str) -> str:
    """Return the path or URL of a file in `root`."""
    return f"{root}/{file}" if isinstance(root, Url) else str(root / file)
