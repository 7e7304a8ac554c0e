"""`python -m rlhf`: the `rlhf` command where its script is not on the path."""

import sys

if __name__ == "__main__":
    from rlhf.cli import main

    sys.exit(main())
