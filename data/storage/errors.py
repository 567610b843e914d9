"""Errors of object stores in one sentence: what is wrong with which URL, and which variable decides it.

The messages of the library hold request addresses and answers of servers, which can contain secrets; of these only the
status and the error code are repeated.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from obstore.exceptions import BaseError

STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>(\w+)</Code>")


class Variables(NamedTuple):
    """The environment variables that decide how a store is reached."""

    credentials: str
    endpoint: str


S3 = Variables("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for none)", "AWS_ENDPOINT_URL")
GCS = Variables("GOOGLE_APPLICATION_CREDENTIALS (GOOGLE_SKIP_SIGNATURE=true for none)", "the URL")
AZURE = Variables("AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ENDPOINT")
OF_SERVER = Variables("who may read it on the server", "the URL")
VARIABLES = {"s3": S3, "s3a": S3, "gs": GCS, "az": AZURE, "abfs": AZURE, "abfss": AZURE}


class Rule(NamedTuple):
    """A kind of error, recognised by the library's message, and the sentence about it, which follows the URL."""

    pattern: str
    kind: type[OSError | ValueError]
    sentence: str


CHANGED = "changed after it was indexed: start again to index it"
RULES = (  # the first that matches
    Rule("NoSuchBucket|ContainerNotFound|bucket does not exist|InvalidBucketName", FileNotFoundError,
         "is in a bucket that does not exist, or that this account cannot see"),
    Rule("BadScheme", ValueError, "is reached over http, which AWS_ALLOW_HTTP=true allows: check {endpoint}"),
    Rule("MissingAccount|MissingCredential|169\\.254\\.169\\.254|metadata\\.google|token request"
         "|latest/api/token|latest/meta-data", PermissionError,
         "needs credentials, and there are none: set {credentials}"),
    Rule("^PermissionDenied|^Unauthenticated|status code: 40[13]", PermissionError,
         "may not be read{because}: check {credentials}"),
    Rule("^FileNotFoundError", FileNotFoundError, "does not exist: upload it, or index what is there"),
    Rule("Received redirect", ValueError, "is in another region: set AWS_REGION"),
    Rule("status code: 416", ValueError, "ends before its index does: it changed after it was indexed"),
    Rule("status code: ", OSError, "cannot be read{because}"),
    Rule("error sending request|[Tt]imed? ?[Oo]ut|[Cc]onnection|error decoding", TimeoutError,
         "cannot be reached: check the network, and {endpoint}"),
    Rule("", OSError, "cannot be read ({name})"),
)  # fmt: skip


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn an error of the library about an object into one that names its URL.

    Raises: FileNotFoundError, PermissionError; TimeoutError when the store does not answer; ValueError for an object
    that has changed; OSError for anything else.
    """
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        kind, problem = explain(error, url)
        raise kind(f"{url} {problem}") from error


def explain(error: Exception, url: str) -> tuple[type[OSError | ValueError], str]:
    """Return the kind of an error of the library, and a sentence that continues the URL."""
    name = type(error).__name__
    text = f"{name}: {error}"
    rule = next(rule for rule in RULES if re.search(rule.pattern, text))
    code = CODE.search(text) or STATUS.search(text)
    because = f" ({code[1]})" if code else ""
    variables = VARIABLES.get(url.partition("://")[0].lower(), OF_SERVER)
    return rule.kind, rule.sentence.format(because=because, name=name, **variables._asdict())
