"""`torchrun rlhf/train.py CONFIG [key=value ...]`: `rlhf train` as a file, which torchrun can start."""

import os
import sys

# run as a file, sys.path begins with rlhf/, whose types.py would hide the types.py of the standard library
if (
    not __package__
    and sys.path
    and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__))
):
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from rlhf.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
