"""The members of a tar, up to an end that only a complete tar has.

A tar ends in two blocks of zeros, then zeros up to the end of a record. Readers stop at the first block and accept what
follows: the zeros of a file that was allocated in full and downloaded in part, or another tar that `cat` has appended.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
# Bytes of a record: 20 blocks unless `tar -b` sets another number, of which powers of two up to 1 MiB are accepted.
RECORDS = (tarfile.RECORDSIZE, *(BLOCK << power for power in range(12)))
CHUNK = 2**20


class JoinedTars(tarfile.ReadError):
    """Another tar follows the end of the first."""


def read_members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar. Raises: tarfile.TarError when it is not a tar, or after what precedes the damage."""
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        yield from tar
        end = tar.offset
    _check_end(stream, end)


def _check_end(stream: BinaryIO, end: int) -> None:
    """Raise tarfile.ReadError unless a tar whose last member ends at `end` is complete."""
    stream.seek(end)
    # Python accepts a tar that is cut between two members or continues as garbage.
    if stream.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError("no end-of-archive mark after the last complete file")
    zeros, header = _count_zeros(stream, end)
    if header:
        start = end + zeros
        if _is_header(header):
            advice = "give both files, or append one at a time with tar --concatenate"
            raise JoinedTars(f"another tar begins at byte {start}, as cat joins them, and would not be read: {advice}")
        raise tarfile.ReadError(f"bytes that are no tar follow its end, from byte {start} on")
    # `tar --concatenate` keeps the padding of the second tar and adds its own: two records at most.
    fitting = [record for record in RECORDS if (end + zeros) % record == 0]
    allowed = max((2 * record + BLOCK for record in fitting), default=0) if end > 0 else tarfile.RECORDSIZE
    if zeros > allowed:
        remedy = f"if no file is missing, truncate --size={end + 2 * BLOCK} removes them"
        raise tarfile.ReadError(f"{zeros:,} bytes of zeros follow the last file, more than tar writes; {remedy}")


def _count_zeros(stream: BinaryIO, start: int) -> tuple[int, bytes]:
    """Return the number of zeros from `start` on, in entire blocks unless they end the file, and the next block."""
    stream.seek(start)
    zeros = 0
    while chunk := stream.read(CHUNK):
        content = chunk.lstrip(b"\0")
        if content:
            zeros += (len(chunk) - len(content)) // BLOCK * BLOCK
            stream.seek(start + zeros)
            return zeros, stream.read(BLOCK)
        zeros += len(chunk)
    return zeros, b""


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
