"""`python -m rlhf`: the same as the `rlhf` command, where that is not on the PATH."""

import sys

if __name__ == "__main__":
    from rlhf.cli import main

    sys.exit(main())
