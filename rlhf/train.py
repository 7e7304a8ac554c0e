"""Entry point: torchrun rlhf/train.py CONFIG [key=value ...]"""

import os
import sys

# run as a file, the first path entry is rlhf/ itself, whose types.py would hide the standard library's
if (
    not __package__
    and sys.path
    and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__))
):
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from rlhf.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
