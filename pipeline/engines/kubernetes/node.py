"""In a pod: start the ranks of this node and exit with the code of the rank that ended first.

`python -m pipeline.engines.kubernetes.node -m pipeline.train +model=resnet` takes the arguments of torchrun, which
exits with 1 whatever its ranks return. The podFailurePolicy of the job needs their codes.
"""

import signal
import sys

from pipeline.cli.errors import FAILURE, USER_ERROR, one_line
from pipeline.cli.signals import EXIT_CODES, SAVE_SECONDS

STOP_SECONDS = int(SAVE_SECONDS) + 20  # torchrun's 30 are less than a save may take
MEETING_SECONDS = 3600  # nodes of a cluster do not start at the same time
KNOWN_CODES = (USER_ERROR, FAILURE, *EXIT_CODES.values())


def main() -> None:
    """Run torchrun's agent. Exits with 0, 1, 2, 130 or 143; a killed rank and nodes that do not meet are failures."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    limits = (f"--shutdown-timeout={STOP_SECONDS}", f"--rdzv-conf=timeout={MEETING_SECONDS}")
    try:
        run(parse_args([*limits, *sys.argv[1:]]))  # type: ignore[no-untyped-call]  # torch leaves them untyped
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode in KNOWN_CODES else FAILURE
        if code != failure.exitcode:
            how = (
                f"was killed by signal {-failure.exitcode}"
                if failure.exitcode < 0
                else f"exited with {failure.exitcode}"
            )
            print(f"error: rank {rank} {how}", file=sys.stderr)
        raise SystemExit(code) from None
    except SignalException as error:
        raise SystemExit(EXIT_CODES.get(error.sigval, EXIT_CODES[signal.SIGTERM])) from None
    except (RuntimeError, OSError, RendezvousError) as error:
        problem = "the nodes have not met" if isinstance(error, RendezvousError) else "the ranks could not be started"
        print(f"error: {problem}: {one_line(error)}", file=sys.stderr)
        raise SystemExit(FAILURE) from None


if __name__ == "__main__":
    main()
