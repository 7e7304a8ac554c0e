"""`keep_freed_memory` keeps freed memory in the process, `give_back_memory` returns it to the system."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import json, torch
from rlhf.devices import give_back_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4 // 1024

def used_and_freed():
    tensors = [torch.ones(1 << 20) for _ in range(100)]
    del tensors
    return resident()

before = resident()
found = [used_and_freed() - before]
keep_freed_memory()
found.append(used_and_freed() - before)
give_back_memory()
found.append(resident() - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be configured")
def test_freed_memory_stays_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    as_delivered, kept, given_back = json.loads(done.stdout)
    # MiB, of 400
    assert as_delivered < 100 and kept > 350 and given_back < 100
