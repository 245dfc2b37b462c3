"""torchrun's agent, which says in one line which rank failed first. Run as a file: the ranks alone decide which package they import."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the ranks to their end; returns 0, or 1 if one failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(list(argv)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}"
        print(f"based launch: rank {rank} (process {failure.pid}) ended first, with {how}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
